"""What an update of a soft prompt costs on paper: operations, memory, bytes on the wire, tokens a second.

For decoders of Llama's shape, from 1 B to 70 B parameters, on 1 to 64 devices. Operations, bytes and parameters are
formulas that `tests/integration/test_cost_model.py` holds to torch's counters; peak, utilisation and links are
assumptions (`Device`), so tokens a second are an estimate and no measurement.

    python bench/cost_model.py [--rows 8] [--tokens 512] [--answer 64] [--virtual 20] [--json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from alone import alone


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder: layers, width, heads and their width, inner width of the MLP, vocabulary, its tables."""

    name: str
    layers: int
    width: int
    heads: int
    key_heads: int
    head_width: int
    inner: int
    vocabulary: int
    tables: int = 2
    """Embedding and head; one where they are tied."""

    @property
    def layer_weights(self) -> int:
        """Weights that a token meets in a layer: four projections of attention and three of the MLP."""
        attention = 2 * self.width * self.head_width * (self.heads + self.key_heads)
        return attention + 3 * self.width * self.inner

    @property
    def in_layers(self) -> int:
        """Parameters of all layers, with the two norms of each."""
        return self.layers * (self.layer_weights + 2 * self.width)

    @property
    def outside(self) -> int:
        """Parameters outside the layers: embedding, head, the last norm."""
        return self.tables * self.vocabulary * self.width + self.width


@dataclass(frozen=True)
class Work:
    """The rows that a device (or a group that splits the layers) has in an update."""

    rows: int = 8
    tokens: int = 512
    answer: int = 64
    virtual: int = 20

    @property
    def stream(self) -> int:
        """Tokens that run: the prompt once, and each row but for its last token, which predicts nothing."""
        return self.virtual + self.rows * (self.tokens - 1)

    @property
    def pairs(self) -> int:
        """Pairs of a token and one that it sees."""
        row = self.tokens - 1
        return self.virtual * (self.virtual + 1) // 2 + self.rows * (row * self.virtual + row * (row + 1) // 2)


@dataclass(frozen=True)
class Device:
    """What a device is assumed to do: H100's dense bfloat16 peak, memory and NVLink, a 400 Gb/s card each."""

    peak: float = 989e12
    utilisation: float = 0.4
    memory: float = 80e9
    near: float = 450e9
    """Bytes a second and direction between the devices of a machine."""
    far: float = 50e9
    machine: int = 8

    def link(self, count: int) -> float:
        """Return the slowest link among so many devices, in bytes a second."""
        return self.near if count <= self.machine else self.far


BASES = (
    Shape("1 B", 16, 2048, 32, 8, 64, 8192, 128_256, tables=1),
    Shape("8 B", 32, 4096, 32, 8, 128, 14_336, 128_256),
    Shape("32 B", 64, 5120, 40, 8, 128, 27_648, 152_064),
    Shape("70 B", 80, 8192, 64, 8, 128, 28_672, 128_256),
)
"""The sizes of Llama 3.2 1B, Llama 3.1 8B, Qwen 2.5 32B and Llama 3.1 70B."""


def products(shape: Shape, work: Work) -> int:
    """Return the operations of products with weights: forward, and the gradient of what entered."""
    layers = shape.layers * shape.layer_weights * work.stream
    return 2 * 2 * (layers + shape.vocabulary * shape.width * work.rows * work.answer)


def attention(shape: Shape, work: Work) -> int:
    """Return the least operations of attention: two products forward, five backward, a pair."""
    return 2 * 7 * shape.layers * shape.heads * shape.head_width * work.pairs


def kept(shape: Shape, size: int, split: int = 1) -> float:
    """Return the bytes of a token that a layer keeps for backward; a frozen product keeps nothing.

    Args:
        shape: The decoder.
        size: Bytes of a number.
        split: Devices that share the inside of a layer.
    """
    norms = 2 * 4 * shape.width  # in float32
    heads = 2 * (shape.heads + shape.key_heads) * shape.head_width  # queries, keys, values, output
    return norms + (size * (heads + 3 * shape.inner) + 4 * shape.heads) / split


@dataclass(frozen=True)
class Cost:
    """What an update costs one device in bytes, and a token of its rows in operations, none of them recomputed."""

    base: str
    devices: int
    way: str
    flops_per_token: float
    weights: float
    activations: float
    recomputed: float
    fits: str
    prompt: int
    wire: float
    tokens_per_second: float
    bound: str


def cost(shape: Shape, work: Work, devices: int, way: str, *, size: int = 2, device: Device = Device()) -> Cost:
    """Return what an update costs.

    Args:
        shape: The base.
        work: The rows of one device; with ``tp`` those of all of them together.
        devices: How many there are.
        way: ``data`` (each has the whole base), ``fsdp`` or ``tp``.
        size: Bytes of a weight.
        device: What each does.
    """
    others, split = (devices - 1) / devices, devices if way == "tp" else 1
    flops = products(shape, work) + attention(shape, work)
    layer = size * shape.in_layers / shape.layers
    weights = size * (shape.outside + shape.in_layers / (1 if way == "data" else devices))
    wire = 2 * others * 4 * work.virtual * shape.width  # the gradient of the prompt, all-reduced
    if way == "fsdp":
        wire += 2 * others * size * shape.in_layers  # every layer gathered, forward and backward
        weights += 2 * layer  # the one that runs, and the next
    elif way == "tp":
        # Sums of a layer: two forward; backward one for each of the five products that read the whole width.
        wire = (2 + 5) * 2 * others * size * shape.layers * work.stream * shape.width
    transfer = wire / device.link(devices) if devices > 1 else 0.0
    logits = 2 * 4 * work.rows * work.answer * shape.vocabulary
    own = work.stream * kept(shape, size, split)
    activations, recomputed = (
        own * shape.layers + logits,
        own + work.stream * size * shape.width * shape.layers + logits,
    )
    room = 0.9 * device.memory - weights
    fits = "yes" if activations <= room else "recomputed" if recomputed <= room else "no"
    run = flops if fits == "yes" else flops * 1.5  # forward again; it is half of the products
    seconds = run / split / (device.peak * device.utilisation)
    # FSDP gathers the next layer while one runs; sums inside layers, and of the gradient, are waited for.
    whole = max(seconds, transfer) if way == "fsdp" else seconds + transfer
    share = transfer / whole
    text = work.rows * work.tokens * (devices // split)
    return Cost(
        base=shape.name,
        devices=devices,
        way=way,
        flops_per_token=flops / (work.rows * work.tokens),
        weights=weights,
        activations=activations,
        recomputed=recomputed,
        fits=fits,
        prompt=4 * 4 * work.virtual * shape.width,
        wire=wire,
        tokens_per_second=text / whole,
        bound="the wire" if share > 0.5 else "computing",
    )


def table(work: Work, device: Device = Device()) -> Iterator[Cost]:
    """Yield what is worth comparing: the whole base on each device, layers sharded, layers split in a machine."""
    for shape in BASES:
        for devices in (1, 8, 64):
            for way in ("data", "fsdp", "tp"):
                found = cost(shape, work, devices, way, device=device)
                useful = way == "data" if devices == 1 else way != "tp" or devices == device.machine
                if useful and (devices == 1 or found.fits != "no"):
                    yield found


HEAD = (
    "| base | devices | way | GFLOPs a token | weights, GB | activations, GB | recomputed, GB | fits 80 GB | wire "
    "| tokens/s | bound by |"
)


def row(each: Cost) -> str:
    """Return a line of the table in docs/distributed.md."""
    speed = "-" if each.fits == "no" else f"{float(f'{each.tokens_per_second:.2g}'):,.0f}"
    wire = "-" if not each.wire else f"{each.wire / 1e9:.1f} GB" if each.wire > 1e8 else f"{each.wire / 1e6:.2f} MB"
    cells = [each.base, str(each.devices), each.way, f"{each.flops_per_token / 1e9:.1f}"]
    cells += [f"{part / 1e9:.1f}" for part in (each.weights, each.activations, each.recomputed)]
    return "| " + " | ".join([*cells, each.fits, wire, speed, each.bound if speed != "-" else "-"]) + " |"


def main() -> None:
    """Print the table, or its numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (asdict(Work()) | asdict(Device())).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--json", action="store_true")
    given = vars(parser.parse_args())
    as_json = given.pop("json")
    work = Work(**{name: given[name] for name in asdict(Work())})
    device = Device(**{name: given[name] for name in asdict(Device())})
    found = list(table(work, device))
    if as_json:
        print(json.dumps([asdict(each) for each in found], indent=2))
        return
    print("\n".join([HEAD, "|---" * HEAD.count(" | ") + "|---|", *map(row, found)]))


if __name__ == "__main__":
    alone()
    main()
