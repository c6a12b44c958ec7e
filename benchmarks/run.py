"""How fast the parts are beside their peers: ratios, each taken in one process with the peer in turn, on one thread.

Where both compute the same thing, answers (and gradients, where they are timed) are compared before; a wrong answer gets no number. A ratio
is the peer's over ours for gains, ours over the peer's for costs, the median over rounds.

python benchmarks/run.py
python benchmarks/run.py --only attention separation --check
"""

import argparse
import importlib.util
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from entmax import entmax15
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import normalize, scaled_dot_product_attention
from transformers import ViTConfig, ViTForImageClassification, ViTModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from modeling_uhop import (
    FeatureMap,
    UHopMemoryConfig,
    UHopMemoryModel,
    UHopViTConfig,
    UHopViTForImageClassification,
    UHopViTModel,
    hopfield_attention,
    plain_hopfield_attention,
    separation_loss,
)


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "training"))
from comparison_figures import growth_figure  # noqa: E402
from recipe import provenance  # noqa: E402


# Memories that a sampled separation loss looks at.
SAMPLE = 4096
SHAPES = [(32, 3, 65, 64), (32, 6, 197, 64), (8, 8, 1024, 64)]

MEMORY_SHAPE = (2, 8, 1024, 64)
GPU_SHAPE = (32, 12, 1024, 64)
# Width and depth of the vision transformers, for images of 224 in patches of 16.
VIT: dict[str, Any] = {"hidden_size": 384, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 1536}
TEN = {label: str(label) for label in range(10)}

# Most that attention forward at 197 tokens may cost beside softmax, by kind of processor: 1.5 was measured on an EPYC with AVX-512, 1.8 on
# one with AVX2 and 1.7 on a Xeon (files in results/). For matrix instructions (AMX) 2.2 was reported, and there is no file.
FORWARD_197 = {"AMX": 2.4, "AVX512": 1.7, "other": 1.9}

Work = Callable[[], Any]
Loss = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Case:
    """A ratio that was measured, and the bound that it is to keep.

    Attributes:
        part, name: What was timed.
        peer: What it was timed beside.
        ours, peers: What was measured in each round: milliseconds, or megabytes or a loss where the name says so.
        at_most, at_least: The bound; one is given, or none.
        error: Largest difference from the peer's answer.
    """

    part: str
    name: str
    peer: str
    ours: list[float]
    peers: list[float]
    at_most: float | None = None
    at_least: float | None = None
    error: float | None = None

    @property
    def ratio(self) -> float:
        """Median over rounds of ours over the peer's, or of the peer's over ours for a bound from below."""
        return statistics.median(
            theirs / own if self.at_least is not None else own / theirs for own, theirs in zip(self.ours, self.peers, strict=True)
        )

    def row(self) -> dict[str, Any]:
        described = {name: getattr(self, name) for name in ("part", "name", "peer", "at_most", "at_least", "error", "ratio", "kept")}
        return {**described, "ours": statistics.median(self.ours), "peers": statistics.median(self.peers), "rounds": len(self.ours)}

    @property
    def kept(self) -> bool:
        return (self.at_most is None or self.ratio <= self.at_most) and (self.at_least is None or self.ratio >= self.at_least)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts to run")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each competitor")
    parser.add_argument("--check", action="store_true", help="end with an error if a ratio is out of its bound")
    parser.add_argument("--output", help="results file (default: benchmarks/results/speed.json if every part is run, and none otherwise)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cases = []
    for part in args.only:
        for case in PARTS[part](args.rounds):
            print(line(case), flush=True)
            cases.append(case)
    whole = args.only == list(PARTS)
    if args.output or whole:
        target = Path(args.output or ROOT / "benchmarks" / "results" / "speed.json")
        results: dict[str, Any] = {"cases": [case.row() for case in cases], **provenance()}
        if whole:
            results["growth"] = growth_of_cost()
            growth_figure(target.with_suffix(".png"), results["growth"])
        target.write_text(json.dumps(results, indent=1) + "\n")
    broken = [case for case in cases if not case.kept]
    if args.check and broken:
        sys.exit(f"{len(broken)} of {len(cases)} ratios are out of their bounds")


def processor() -> str:
    """The kind of processor that a bound is for: "AMX", "AVX512", or "other"."""
    information = Path("/proc/cpuinfo")
    if information.is_file() and "amx_tile" in information.read_text():
        return "AMX"
    return "AVX512" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "other"


def line(case: Case) -> str:
    bound = f"<= {case.at_most}" if case.at_most is not None else f">= {case.at_least}" if case.at_least is not None else ""
    meaning = "less than" if case.at_least is not None else "as much as"
    return f"{case.name:<58} {case.ratio:8.3g} times {meaning} {case.peer:<28} {bound:<8} {'' if case.kept else 'OUT OF BOUND'}"


def interleaved(rounds: int, *works: Work, clock: Callable[[], float] = time.process_time) -> list[list[float]]:
    """Milliseconds (of CPU time, by default) of each in every round, run in turn."""
    times: list[list[float]] = [[] for _ in works]
    for work in works:
        work()
    for _ in range(rounds):
        for work, own in zip(works, times, strict=True):
            started = clock()
            work()
            own.append(1e3 * (clock() - started))
    return times


def difference(ours: torch.Tensor, peer: torch.Tensor, tolerance: float) -> float:
    """Largest difference; a `SystemExit` if it is above the tolerance, as the time of a wrong answer means nothing."""
    error = (ours.double() - peer.double()).abs().max().item()
    if not error <= tolerance:
        sys.exit(f"the answers differ by {error}, more than {tolerance}: nothing was timed")
    return error


def with_gradients(attend: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> Work:
    def work():
        return torch.autograd.grad(attend(*inputs).sum(), inputs)

    return work


def attention(rounds: int) -> Iterator[Case]:
    """1.5-entmax attention beside scaled_dot_product_attention, and beside the entmax library in the same layer."""

    def ours(query, key, value):
        return hopfield_attention(query, key, value, alpha=1.5, scaling=0.125)

    def library(query, key, value):
        return entmax15(0.125 * query @ key.mT, dim=-1) @ value

    def softmax(query, key, value):
        return scaled_dot_product_attention(query, key, value)

    # Most that it may cost beside softmax, and least that it must be faster than the library: forward, and with gradients.
    bounds = {65: ((None, 1.5), (1.0, 1.0)), 197: ((FORWARD_197[processor()], 1.5), (9.0, 4.0)), 1024: ((2.0, 1.5), (15.0, 7.0))}
    for shape in SHAPES:
        at_most, at_least = bounds[shape[2]]
        inputs = [torch.randn(shape, requires_grad=True) for _ in range(3)]
        without = [x.detach() for x in inputs]
        error = difference(ours(*without), library(*(x.double() for x in without)), 2e-5)
        gradients = with_gradients(ours, inputs)()
        for mine, theirs in zip(gradients, with_gradients(library, inputs)(), strict=True):
            difference(mine, theirs, 1e-3 * theirs.abs().max().item())
        for index, what in enumerate(("forward", "with gradients")):

            def work(attend, index=index, inputs=inputs, without=without) -> Work:
                return with_gradients(attend, inputs) if index else partial(attend, *without)

            name = f"1.5-entmax attention {shape}, {what}"
            own, peers = interleaved(rounds, work(ours), work(softmax))
            yield Case("attention", name, "scaled_dot_product_attention", own, peers, at_most=at_most[index], error=error)
            own, peers = interleaved(rounds, work(ours), work(library))
            yield Case("attention", name, "entmax library", own, peers, at_least=at_least[index], error=error)

    ours_mb, peer_mb = (attention_memory(name) for name in ("ours", "softmax"))
    name = f"memory (MB), attention {MEMORY_SHAPE}, with gradients"
    yield Case("attention", name, "scaled_dot_product_attention", [ours_mb], [peer_mb], at_most=1.2)


def attention_memory(name: str) -> float:
    """Megabytes that attention and its gradients add to a fresh process, the inputs not counted."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_attention_memory, (name,))


def _attention_memory(name: str) -> float:
    torch.set_num_threads(1)
    attend = partial(hopfield_attention, alpha=1.5) if name == "ours" else scaled_dot_product_attention
    with_gradients(attend, [torch.randn(1, 1, 2, 64, requires_grad=True) for _ in range(3)])()
    return _peak_of(with_gradients(attend, [torch.randn(MEMORY_SHAPE, requires_grad=True) for _ in range(3)]))


def folding(rounds: int) -> Iterator[Case]:
    """A U-Hop ViT at alpha = 1 whose feature maps are folded, beside transformers' ViT of the same size."""
    model = UHopViTModel(UHopViTConfig(**VIT, image_size=224, patch_size=16, feature_init="normal")).eval()
    folded = model.fold_feature_maps()
    peer = ViTModel(ViTConfig(**VIT)).eval()
    images = torch.randn(8, 3, 224, 224)
    with torch.no_grad():
        error = difference(folded(images).last_hidden_state, model(images).last_hidden_state, 5e-6)
        times = interleaved(rounds, lambda: folded(images), lambda: peer(images), lambda: model(images))
    yield Case("folding", "ViT, 3 layers of 384, folded", "transformers' ViT", times[0], times[1], at_most=1.03, error=error)
    yield Case("folding", "ViT, 3 layers of 384, not folded", "transformers' ViT", times[2], times[1])


def pdist_loss(features: torch.Tensor, reduce: Callable = torch.mean) -> torch.Tensor:
    """The average separation loss as the authors' code has it."""
    return reduce(torch.pdist(normalize(features, dim=-1)).square().mul(-2.0).exp()).log()


def gradient_of(loss: Loss, features: torch.Tensor) -> Work:
    features = features.detach().requires_grad_()
    return lambda: torch.autograd.grad(loss(features), features)[0]


def separation(rounds: int) -> Iterator[Case]:
    """Separation losses with their gradients beside torch.pdist's."""

    def nearest(features):
        return separation_loss(features, kind="nearest")

    def farthest_pdist(features):
        return pdist_loss(features, torch.max)

    def image_loop(features):
        return torch.stack([pdist_loss(image) for image in features]).mean()

    losses: list[tuple[str, Loss, Loss, tuple[int, ...], float | None]] = [
        ("average, M 2000, D 128", separation_loss, pdist_loss, (2000, 128), None),
        ("average, M 8000, D 128", separation_loss, pdist_loss, (8000, 128), 7.0),
        ("nearest, M 8000, D 128", nearest, farthest_pdist, (8000, 128), 10.0),
        ("average, 200 images of 64 patches, D 512", separation_loss, image_loop, (200, 64, 512), 2.5),
    ]
    for name, loss, peer, shape, bound in losses:
        features = torch.randn(shape)
        error = difference(loss(features), peer(features), 1e-5)
        works = [gradient_of(loss, features), gradient_of(peer, features)]
        gradients = [work() for work in works]
        size = gradients[1].abs().max()
        error = max(error, difference(gradients[0] / size, gradients[1] / size, 1e-3))
        ours, peers = interleaved(rounds, *works)
        yield Case("separation", f"separation loss, {name}", "torch.pdist", ours, peers, at_least=bound or 1.0, error=error)
    ours_mb, peer_mb = (peak_memory(loss, 8000) for loss in ("ours", "pdist"))
    yield Case("separation", "memory (MB), average, M 8000, D 128", "torch.pdist", [ours_mb], [peer_mb], at_least=10.0)
    yield Case("separation", "memory (MB), average, M 30000, D 128", "200 MB", [peak_memory("ours", 30000)], [200.0], at_most=1.0)


def sampling(rounds: int) -> Iterator[Case]:
    """The separation loss of a sample of the memories: how far it is off, and what a million of them need."""
    centres = torch.randn(1000, 128)
    features = centres[torch.randint(1000, (50_000,))] + torch.randn(50_000, 128)
    with torch.no_grad():
        exact = separation_loss(features)
        drawn = torch.stack([separation_loss(features, sample=SAMPLE) for _ in range(20)])
    errors = (drawn - exact).abs().tolist()
    yield Case("sampling", f"error of the loss, {SAMPLE} of M 50,000", "the loss", errors, [exact.abs().item()] * 20, at_most=0.01)
    used = peak_memory("sampled", 1_000_000, count_memories=True)
    yield Case("sampling", f"memory (MB), {SAMPLE} of M 1,000,000, D 128, all told", "2 GB", [used], [2048.0], at_most=1.0)


def peak_memory(loss: str, count: int, *, count_memories: bool = False) -> float:
    """Megabytes that a loss of `count` memories and its gradient add to a fresh process."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_memory, (loss, count, count_memories))


def _peak_memory(loss: str, count: int, count_memories: bool) -> float:
    torch.set_num_threads(1)
    losses: dict[str, Loss] = {"ours": separation_loss, "pdist": pdist_loss, "sampled": partial(separation_loss, sample=SAMPLE)}
    work = losses[loss]
    gradient_of(work, torch.randn(16, 128))()
    without = _status("VmRSS")
    features = torch.randn(count, 128)
    return _peak_of(gradient_of(work, features), without if count_memories else None)


def _peak_of(work: Work, before: int | None = None) -> float:
    """Megabytes at the peak of a work above `before`, what the process has now by default."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS") if before is None else before
    work()
    return max(1, _status("VmHWM") - before) / 1024.0


def _status(name: str) -> int:
    """Kilobytes that Linux reports of this process."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))


def retrieval(rounds: int) -> Iterator[Case]:
    """Retrieval beside a loop over queries that computes features anew, as the authors' code does, and beside the bare products."""
    memory = stored(500, 784)
    queries = torch.randn(500, 784)

    def loop():
        weight = cast(FeatureMap, memory.feature_map).weight
        rows = []
        for query in queries:
            scores = memory.config.beta * normalize(memory.memories @ weight.T, dim=-1) @ normalize(weight @ query, dim=-1)
            rows.append(entmax15(scores, dim=-1) @ memory.memories)
        return torch.stack(rows)

    with torch.no_grad():
        error = difference(memory(queries, output_energies=False).retrieved, loop(), 1e-5)
        ours, peers = interleaved(rounds, lambda: memory(queries, output_energies=False), loop)
        yield Case("retrieval", "500 memories, 500 queries, D 784", "loop over queries", ours, peers, at_least=90.0, error=error)
        memory = stored(100_000, 128)
        queries = normalize(memory.memories[:1000] + torch.randn(1000, 128), dim=-1)
        features = memory.stored_features()
        some = torch.arange(0, 1000, 50)
        error = difference(cast(torch.Tensor, memory.search(queries[some]).retrieved), memory(queries[some]).retrieved, 1e-5)

        def scores():
            for part in queries.split(160):
                part @ features.T

        ours, peers = interleaved(rounds, lambda: memory.search(queries), scores)
        yield Case("retrieval", "100,000 memories, 1000 queries, D 128, exact", "bare product", ours, peers, at_most=1.4, error=error)


def training(rounds: int) -> Iterator[Case]:
    """A training step of a U-Hop ViT beside transformers' ViT of the same size, and a separation step beside a training step."""
    images, labels = torch.randn(8, 3, 224, 224), torch.randint(10, (8,))
    bounds = {1.0: 1.15, 1.5: 1.5, 2.0: 1.5}
    peer = ViTForImageClassification(ViTConfig(**VIT, id2label=TEN))
    models = [
        UHopViTForImageClassification(UHopViTConfig(**VIT, image_size=224, patch_size=16, id2label=TEN, alpha=alpha)) for alpha in bounds
    ]

    def step_of(model) -> Work:
        optimizer = torch.optim.AdamW(model.parameters())

        def step():
            model(pixel_values=images, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def separation_step(moved: str, model=models[1]) -> None:
        with torch.set_grad_enabled(moved == "upstream"):
            sets = list(model.memory_sets(pixel_values=images))
        loss = torch.stack([separation_loss(part.features()) for part in sets]).sum()
        moving = model.parameters() if moved == "upstream" else [part.feature_map.weight for part in sets]
        torch.autograd.grad(loss, list(moving), allow_unused=True)

    separations = {"upstream": "all below", "feature_maps": "Phi alone"}
    works: list[Work] = [step_of(peer), *(step_of(model) for model in models), *(partial(separation_step, moved) for moved in separations)]
    taken, *ours = interleaved(rounds, *works)
    for (alpha, bound), own in zip(bounds.items(), ours[: len(models)], strict=True):
        yield Case("training", f"training step of a ViT, 3 layers of 384, alpha {alpha}", "transformers' ViT", own, taken, at_most=bound)
    for moved, own in zip(separations.values(), ours[len(models) :], strict=True):
        yield Case("training", f"separation step of the same, alpha 1.5, {moved}", "its training step", own, ours[1])


def gpu(rounds: int) -> Iterator[Case]:
    """The Triton kernels with their gradients, beside FlashAttention, and adasplash where it is installed; nothing without a GPU."""
    if not torch.cuda.is_available():
        print("no GPU here: its kernels are not timed")
        return
    yield from triton_kernels(rounds, [torch.randn(GPU_SHAPE, device="cuda", dtype=torch.bfloat16) for _ in range(3)], clock=gpu_clock)


def triton_kernels(rounds: int, inputs: list[torch.Tensor], clock: Callable[[], float]) -> Iterator[Case]:
    """`gpu` for a query, key and value in half precision."""
    attention_of_models = ALL_ATTENTION_FUNCTIONS["hopfield_triton"]

    def ours(query, key, value):
        return attention_of_models(torch.nn.Module().eval(), query, key, value, None, alpha=1.5)[0].transpose(1, 2)

    def flash(query, key, value):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(query, key, value)

    inputs = [x.detach().requires_grad_() for x in inputs]
    some = [x.detach()[:1].clone().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in some]
    output = plain_hopfield_attention(*exact, alpha=1.5)
    gradients = torch.autograd.grad(output.sum(), exact)

    def difference_of(attend: Callable[..., torch.Tensor]) -> float:
        error = difference(attend(*some), output, 2e-2)
        for actual, expected in zip(with_gradients(attend, some)(), gradients, strict=True):
            difference(actual, expected, 2e-2 * expected.abs().max().item())
        return error

    error = difference_of(ours)
    peers: dict[str, tuple[Callable[..., torch.Tensor], dict[str, float]]] = {"FlashAttention": (flash, {"at_most": 2.0})}
    if importlib.util.find_spec("adasplash") is not None:
        adasplash = importlib.import_module("adasplash")
        for name, attend in (("adasplash", adasplash.adasplash_v1), ("adasplash, no block mask", adasplash.adasplash_no_block_mask)):
            peers[name] = partial(attend, alpha=1.5, is_causal=False), {"at_least": 1.0}
    what = f"1.5-entmax attention {tuple(inputs[0].shape)}, {str(inputs[0].dtype).removeprefix('torch.')}, with gradients"
    for peer, (attend, bound) in peers.items():
        if attend is not flash:
            difference_of(attend)
        own, theirs = interleaved(rounds, with_gradients(ours, inputs), with_gradients(attend, inputs), clock=clock)
        yield Case("gpu", what, peer, own, theirs, error=error, **bound)


def gpu_clock() -> float:
    """Seconds, once the GPU has done what it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


def stored(count: int, width: int) -> UHopMemoryModel:
    memory = UHopMemoryModel(UHopMemoryConfig(pattern_dim=width, alpha=1.5, beta=10.0)).eval()
    memory.store(normalize(torch.randn(count, width), dim=-1))
    return memory


PARTS: dict[str, Callable[[int], Iterator[Case]]] = {
    "attention": attention,
    "folding": folding,
    "separation": separation,
    "sampling": sampling,
    "retrieval": retrieval,
    "training": training,
    "gpu": gpu,
}


def growth_of_cost() -> dict[str, Any]:
    """Milliseconds over N for attention and over M for the separation loss, with their gradients."""
    curves: dict[str, Any] = {"attention": {}, "separation": {}}
    for size in logging.tqdm((64, 128, 256, 512, 1024, 2048), desc="growth of attention"):
        inputs = [torch.randn(1, 4, size, 64, requires_grad=True) for _ in range(3)]
        competitors = {
            "1.5-entmax, ours": lambda q, k, v: hopfield_attention(q, k, v, alpha=1.5, scaling=0.125),
            "sparsemax, ours": lambda q, k, v: hopfield_attention(q, k, v, alpha=2.0, scaling=0.125),
            "softmax, scaled_dot_product_attention": scaled_dot_product_attention,
            "1.5-entmax, entmax library": lambda q, k, v: entmax15(0.125 * q @ k.mT, dim=-1) @ v,
        }
        times = interleaved(5, *(with_gradients(attend, inputs) for attend in competitors.values()))
        for name, taken in zip(competitors, times, strict=True):
            curves["attention"].setdefault(name, {})[size] = statistics.median(taken)
    for size in logging.tqdm((250, 500, 1000, 2000, 4000, 8000), desc="growth of separation"):
        features = torch.randn(size, 128)
        times = interleaved(3, gradient_of(separation_loss, features), gradient_of(pdist_loss, features))
        for name, taken in zip(("ours, in blocks", "torch.pdist"), times, strict=True):
            curves["separation"].setdefault(name, {})[size] = statistics.median(taken)
    return curves


if __name__ == "__main__":
    main()
