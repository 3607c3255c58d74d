"""Commands that are a few lines of their own."""

from collections.abc import Sequence
from pathlib import Path

from paml.errors import PamlError, SettingsError
from paml.recipes import find_recipe, recipe_names, summary


def verify(folder: str, deep: bool = True, workers: int | None = None) -> int:
    """Check a folder of shards. Returns 1 if an image is lost.

    Args:
        folder: a folder of shards with manifest.arrow.
        deep: read every byte and compare SHA-256; false compares sizes only.
        workers: processes; null uses all CPUs.
    """
    from paml.progress import progress_display
    from paml.shards.verify import verify_shards

    with progress_display(None) as progress:
        report = verify_shards(folder, deep=deep, workers=workers, progress=progress)
    print(report)
    return 0 if report.ok else 1


def recipes(arguments: Sequence[str]) -> None:
    """List the recipes, or print the one that is named."""
    if len(arguments) > 1:
        raise SettingsError(f"paml recipes takes one name, not {' '.join(arguments)!r}")
    if arguments:
        print(Path(find_recipe(arguments[0])).read_text(), end="")
        return
    width = max(map(len, recipe_names()))
    print("\n".join(f"{name:<{width}}  {summary(name)}" for name in recipe_names()))


def sync(run_folder: str, tracking_uri: str | None = None, tracker: str = "mlflow", status: str | None = None) -> int:
    """Send what a tracker lacks of a run's journal. Returns 1 if not all of it could be sent.

    Args:
        run_folder: folder of the run, local or s3://.
        tracking_uri: server or store of the tracker; null uses the run's usual one.
        tracker: name of the tracker.
        status: ends a run whose process was killed (FINISHED, FAILED or KILLED); null keeps the journal's status.
    """
    from paml import tracking
    from paml.progress import progress_display

    try:
        with progress_display(None) as progress:
            report = tracking.sync(
                run_folder,
                tracking_uri,
                tracker=tracker,
                status=status,
                progress=lambda done, total: progress("events", done, total),
            )
    except (PamlError, OSError):
        raise
    except Exception as error:  # whatever the tracker's library raises
        raise PamlError(f"{tracker} is unreachable ({tracking.short_reason(error)}); run this again later") from error
    print(report)
    return 0 if report.complete else 1
