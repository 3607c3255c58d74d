"""Images a second of the whole training step, from synthetic batches and from shards, and who waits for whom.

On a GPU: python benchmarks/step.py --backbone resnet50 --size 448 --batch 256 --classes 5000
Prints images/s (synthetic, shards), their ratio, the share of the card's matrix peak, and every call of the profiled
step that makes the host wait for the device. Needs torch, torchvision, numpy, pyarrow, PIL and safetensors alone.
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
from paml.training.optimiser import OptimiserSettings
from paml.training.settings import DataSettings, TrainSettings, WorkerSettings
from paml.training.state import TrainState, new_state
from paml.training.step import settle_waiting, train_step
from paml.training.world import World, current_world

WAITS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaMemcpy",
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::nonzero",
)


def synthetic_batch(size: int, batch: int, classes: int, pin: bool, step: int) -> Batch:
    """Random pixels; three annotated classes an image, about what Open Images V3 has."""
    generator = np.random.default_rng(step)
    images = torch.empty((batch, size, size, 3), dtype=torch.uint8, pin_memory=pin)
    images.random_(0, 256)
    image = np.repeat(np.arange(batch, dtype=np.int32), 3)
    cls = generator.integers(0, classes, len(image)).astype(np.int32)
    state = generator.integers(0, 2, len(image)).astype(np.int8)
    nothing = LabelTriples.of(Triples(*(values[:0] for values in (image, cls, state))))
    return Batch(
        step=step,
        images=images,
        flips=torch.from_numpy(generator.random(batch) < 0.5),
        slots=torch.arange(batch),
        index=np.arange(batch),
        keys=lambda: [],
        labels=LabelTriples.of(Triples(image, cls, state)),
        probe=nothing,
        truth=None,
        bad=(),
    )


def write_data(folder: Path, size: int, images: int, classes: int) -> None:
    """A prepared folder of noise-textured JPEGs at the training size (about 50 KB each at 448)."""
    from paml.shards import index_shards

    generator = np.random.default_rng(0)

    def picture() -> bytes:
        from PIL import Image

        coarse = generator.integers(0, 256, (size // 16 + 1, size // 16 + 1, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC), dtype=np.int16)
        grain = generator.normal(0, 9, (size, size, 1))
        buffer = io.BytesIO()
        Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        return buffer.getvalue()

    distinct = [picture() for _ in range(min(images, 64))]
    keys = [f"{n:016x}" for n in range(images)]
    mids = [f"/m/{n:05d}" for n in range(classes)]
    image = np.repeat(np.arange(images), 3)
    cls = (np.arange(len(image)) * 7919) % classes
    state = (np.arange(len(image)) % 2).astype(np.int8)
    for split in ("train", "validation"):
        kept = images if split == "train" else 8
        tars = folder / "shards" / split
        tars.mkdir(parents=True)
        with tarfile.open(tars / "000000.tar", "w") as tar:  # not TarWriter: a GPU machine may lack webdataset
            for n in range(kept):
                member = tarfile.TarInfo(f"{keys[n]}.jpg")
                member.size = len(distinct[n % len(distinct)])
                tar.addfile(member, io.BytesIO(distinct[n % len(distinct)]))
        index_shards(str(tars), str(tars))
        chosen = image < kept
        table_from_triples(
            keys[:kept],
            mids,
            mids,
            image[chosen],
            cls[chosen],
            state[chosen],
            str(folder / "labels" / f"{split}.arrow"),
        )


def rate(state: TrainState, batches, images: int, device: torch.device) -> float:
    """Images a second over the batches given, the first three left out."""
    begun = 0.0
    count = 0
    for number, batch in enumerate(batches):
        if number == 3:
            _wait(device)
            begun = time.perf_counter()
        train_step(state, batch, last=False)
        count += number >= 3
    settle_waiting(state)
    _wait(device)
    return count * images / (time.perf_counter() - begun)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def flops_per_image(state: TrainState, size: int) -> float:
    """Forward and backward matrix work of one image, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    images = torch.zeros(1, 3, size, size, device=state.world.device)
    state.model.eval()
    with FlopCounterMode(display=False) as counter:
        state.model(images, 5.0).sum().backward()
    state.model.zero_grad()
    set_training(state.model, state.settings.model)
    return float(counter.get_total_flops())


def matrix_peak(device: torch.device) -> float:
    """FLOP/s of a large bf16 matrix product on this device, the practical peak."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    _wait(device)
    begun = time.perf_counter()
    for _ in range(10):
        a @ a
    _wait(device)
    return 10 * 2 * side**3 / (time.perf_counter() - begun)


def waits(state: TrainState, batch: Batch) -> dict[str, int]:
    """Calls in two profiled steps that make the host wait for the device."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as profiled:
        for _ in range(2):
            train_step(state, batch, last=False)
    names = {event.key: event.count for event in profiled.key_averages()}
    return {name: count for name, count in names.items() if name in WAITS}


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
            data=DataSettings(root=str(folder), test_split=None, probe=0.0),
            model=ModelSettings(backbone=options.backbone, weights=None),
            boost=BoostSettings(train=5.0),
            loss=LossSettings(name="ll-r", reject_rate_step=1e-4),
            optimiser=OptimiserSettings(learning_rate=1e-5),
            workers=WorkerSettings(num_workers=0),
            batch_size=options.batch,
        )
        data = open_data(settings.data)
        model = build_model(settings.model, options.classes)
        state = new_state(settings, world, model, options.classes, options.steps)
        state.epoch = 5  # rejection at work
        set_training(state.model, settings.model)
        pin = world.device.type == "cuda"
        made = [synthetic_batch(options.size, options.batch, options.classes, pin, n) for n in range(2)]
        found: dict[str, list[float]] = {"synthetic": [], "shards": []}
        for round_ in range(options.rounds):
            batches = [made[n % 2] for n in range(options.steps)]
            found["synthetic"].append(rate(state, batches, options.batch, world.device))
            loader = train_loader(settings, data, world, epoch=round_ + 1, start=0, overlay=state.overlay, probe=0.0)
            found["shards"].append(rate(state, loader, options.batch, world.device))
        ratios = [b / a for a, b in zip(found["synthetic"], found["shards"], strict=True)]
        synthetic = statistics.median(found["synthetic"])
        work, peak = flops_per_image(state, options.size), matrix_peak(world.device)
        print(
            f"{options.backbone} {options.size} px, batch {options.batch}, K {options.classes}, "
            f"{world.device}, {state.autocast}"
        )
        print(f"synthetic {synthetic:.1f} images/s, shards {statistics.median(found['shards']):.1f} images/s")
        print(f"shards / synthetic: median {statistics.median(ratios):.3f} of {len(ratios)} paired rounds")
        print(
            f"{work / 1e9:.1f} GFLOP an image; {synthetic * work / peak:.1%} of a measured peak of "
            f"{peak / 1e12:.1f} TFLOP/s"
        )
        if world.device.type == "cuda":
            print(f"calls that wait for the device in two steps: {waits(state, made[0]) or 'none'}")
            print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
