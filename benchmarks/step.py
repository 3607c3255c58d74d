"""Images per second of the whole training step, with synthetic batches and with batches from shards.

On a GPU: python benchmarks/step.py --backbone resnet50 --size 448 --batch 256 --classes 5000
Prints both rates and their ratio; on a GPU also the fraction of its peak in matrix products, and the calls of a
profiled step that make the host wait for the device. Needs only torch, torchvision, numpy, pyarrow, PIL and
safetensors.
"""

import argparse
import io
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from paml.data.loader import Batch, LabelTriples
from paml.labels import table_from_triples
from paml.labels.table import Triples
from paml.losses import LossSettings
from paml.models import BoostSettings, ModelSettings, build_model
from paml.models.cam import set_training
from paml.training.data import open_data, train_loader
from paml.training.optimizer import OptimizerSettings
from paml.training.settings import DataSettings, TrainSettings, WorkerSettings
from paml.training.state import TrainState
from paml.training.step import flush_pending, train_step
from paml.training.world import World, current_world

BLOCKING_CALLS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaMemcpy",
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::nonzero",
)


def synthetic_batch(size: int, batch: int, classes: int, pin: bool, step: int) -> Batch:
    """Random pixels and three annotated classes per image, about as many as in Open Images V3."""
    generator = np.random.default_rng(step)
    images = torch.empty((batch, size, size, 3), dtype=torch.uint8, pin_memory=pin)
    images.random_(0, 256)
    image = np.repeat(np.arange(batch, dtype=np.int32), 3)
    cls = generator.integers(0, classes, len(image)).astype(np.int32)
    state = generator.integers(0, 2, len(image)).astype(np.int8)
    no_labels = LabelTriples.of(Triples(*(values[:0] for values in (image, cls, state))))
    return Batch(
        step=step,
        images=images,
        flips=torch.from_numpy(generator.random(batch) < 0.5),
        slots=torch.arange(batch),
        index=np.arange(batch),
        keys=lambda: [],
        labels=LabelTriples.of(Triples(image, cls, state)),
        probe=no_labels,
        truth=None,
        bad=(),
    )


def write_data(folder: Path, size: int, images: int, classes: int) -> None:
    """Write a prepared folder of noisy JPEG images at the training size (about 50 KB each at 448 px)."""
    from paml.shards import index_shards

    generator = np.random.default_rng(0)

    def random_jpeg() -> bytes:
        from PIL import Image

        coarse = generator.integers(0, 256, (size // 16 + 1, size // 16 + 1, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC), dtype=np.int16)
        noise = generator.normal(0, 9, (size, size, 1))
        buffer = io.BytesIO()
        Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        return buffer.getvalue()

    distinct = [random_jpeg() for _ in range(min(images, 64))]
    keys = [f"{n:016x}" for n in range(images)]
    mids = [f"/m/{n:05d}" for n in range(classes)]
    image = np.repeat(np.arange(images), 3)
    cls = (np.arange(len(image)) * 7919) % classes
    state = (np.arange(len(image)) % 2).astype(np.int8)
    for split in ("train", "validation"):
        count = images if split == "train" else 8
        tars = folder / "shards" / split
        tars.mkdir(parents=True)
        with tarfile.open(tars / "000000.tar", "w") as tar:  # not TarWriter: a GPU machine may lack webdataset
            for n in range(count):
                member = tarfile.TarInfo(f"{keys[n]}.jpg")
                member.size = len(distinct[n % len(distinct)])
                tar.addfile(member, io.BytesIO(distinct[n % len(distinct)]))
        index_shards(str(tars), str(tars))
        selected = image < count
        table_from_triples(
            keys[:count],
            mids,
            mids,
            image[selected],
            cls[selected],
            state[selected],
            str(folder / "labels" / f"{split}.arrow"),
        )


def rate(state: TrainState, batches, images: int, device: torch.device) -> float:
    """Images per second over the batches, without the first three."""
    start, count = 0.0, 0
    for number, batch in enumerate(batches):
        if number == 3:
            _synchronize(device)
            start = time.perf_counter()
        train_step(state, batch, last=False)
        count += number >= 3
    flush_pending(state)
    _synchronize(device)
    return count * images / (time.perf_counter() - start)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def flops_per_image(state: TrainState, size: int) -> float:
    """Floating-point operations of forward and backward for one image, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    images = torch.zeros(1, 3, size, size, device=state.world.device)
    state.model.eval()
    with FlopCounterMode(display=False) as counter:
        state.model(images, 5.0).sum().backward()
    state.model.zero_grad()
    set_training(state.model, state.settings.model)
    return float(counter.get_total_flops())


def matrix_peak(device: torch.device) -> float:
    """FLOP/s of a large bf16 matrix product on a GPU, its practical peak."""
    side = 8192
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(10):
        a @ a
    _synchronize(device)
    return 10 * 2 * side**3 / (time.perf_counter() - start)


def blocking_calls(state: TrainState, batch: Batch) -> dict[str, int]:
    """Number of calls in two profiled steps that make the host wait for the device, by name."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler:
        for _ in range(2):
            train_step(state, batch, last=False)
    names = {event.key: event.count for event in profiler.key_averages()}
    return {name: count for name, count in names.items() if name in BLOCKING_CALLS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--size", type=int, default=448)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--classes", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    world: World = current_world()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder, options.size, options.batch * options.steps, options.classes)
        settings = TrainSettings(
            data=DataSettings(root=str(folder), test_split=None, probe_fraction=0.0),
            model=ModelSettings(backbone=options.backbone, weights=None),
            boost=BoostSettings(train=5.0),
            loss=LossSettings(name="ll-r", reject_rate_step=1e-4),
            optimizer=OptimizerSettings(learning_rate=1e-5),
            workers=WorkerSettings(num_workers=0),
            batch_size=options.batch,
        )
        data = open_data(settings.data)
        model = build_model(settings.model, options.classes)
        state = TrainState(settings, world, model, data)
        state.epoch = 5  # after the warm-up epoch, so that labels are rejected
        set_training(state.model, settings.model)
        pin = world.device.type == "cuda"
        synthetic_batches = [synthetic_batch(options.size, options.batch, options.classes, pin, n) for n in range(2)]
        rates: dict[str, list[float]] = {"synthetic": [], "shards": []}
        for number in range(options.rounds):
            batches = [synthetic_batches[n % 2] for n in range(options.steps)]
            rates["synthetic"].append(rate(state, batches, options.batch, world.device))
            loader = train_loader(
                settings, data, world, epoch=number + 1, start=0, overlay=state.overlay, probe_fraction=0.0
            )
            rates["shards"].append(rate(state, loader, options.batch, world.device))
        ratios = [b / a for a, b in zip(rates["synthetic"], rates["shards"], strict=True)]
        synthetic = statistics.median(rates["synthetic"])
        print(
            f"{options.backbone} {options.size} px, batch {options.batch}, K {options.classes}, "
            f"{world.device}, {state.autocast}"
        )
        print(f"synthetic {synthetic:.1f} images/s, shards {statistics.median(rates['shards']):.1f} images/s")
        print(f"shards / synthetic: median {statistics.median(ratios):.3f} of {len(ratios)} paired rounds")
        if world.device.type == "cuda":
            flops, peak = flops_per_image(state, options.size), matrix_peak(world.device)
            print(
                f"{flops / 1e9:.1f} GFLOP per image; {synthetic * flops / peak:.1%} of a measured peak of "
                f"{peak / 1e12:.1f} TFLOP/s"
            )
            print(
                f"calls that wait for the device in two steps: {blocking_calls(state, synthetic_batches[0]) or 'none'}"
            )
            print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
