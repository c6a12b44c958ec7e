"""Measure how fast the parts of the package are compared with baselines.

Each ratio is measured in one process on one thread, with the package and the baseline in turn. If
both compute the same function, their outputs (and gradients, if these are timed) are compared
before timing; a wrong output ends the benchmark. A gain is the measurement of the baseline divided
by ours; a cost is our measurement divided by that of the baseline. Both are medians over rounds.

python benchmarks/run.py
python benchmarks/run.py --only attention separation --check
"""

import argparse
import copy
import importlib.util
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
from peft import LoraConfig, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import normalize, scaled_dot_product_attention
from transformers import GPT2Config, GPT2Model, ViTConfig, ViTForImageClassification, ViTModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from modeling_uhop import (
    FeatureMap,
    StageOne,
    UHopAdapterConfig,
    UHopMemoryConfig,
    UHopMemoryModel,
    UHopViTConfig,
    UHopViTForImageClassification,
    UHopViTModel,
    hopfield_attention,
    plain_hopfield_attention,
    separation_loss,
)
from modeling_uhop.training.report.comparison_figures import growth_figure
from modeling_uhop.training.results import write_result


ROOT = Path(__file__).parent.parent
# Number of memories in the sample of a sampled separation loss.
SAMPLE = 4096
SHAPES = [(32, 3, 65, 64), (32, 6, 197, 64), (8, 8, 1024, 64)]

MEMORY_SHAPE = (2, 8, 1024, 64)
GPU_SHAPE = (32, 12, 1024, 64)
# Size of the vision transformers, for images of 224 x 224 pixels with patches of 16 x 16.
VIT: dict[str, Any] = {"hidden_size": 384, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 1536}
TEN = {label: str(label) for label in range(10)}

# Largest allowed cost of attention compared with softmax, forward at 197 tokens, by kind of
# processor. We measured 1.5 on an EPYC with AVX-512, 1.8 on one with AVX2 and 1.7 on a Xeon (files
# in results/). For matrix instructions (AMX), 2.2 was reported, without a file.
FORWARD_197 = {"AMX": 2.4, "AVX512": 1.7, "other": 1.9}

Work = Callable[[], Any]
Loss = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Case:
    """A measured ratio and its bound.

    Attributes:
        part, name: What was timed.
        baseline: What it is compared with.
        ours, baselines: Measurements of each round: milliseconds, or megabytes or a loss if the
            name says so.
        at_most, at_least: The bound: at most one of the two is given.
        error: Largest difference from the output of the baseline.
    """

    part: str
    name: str
    baseline: str
    ours: list[float]
    baselines: list[float]
    at_most: float | None = None
    at_least: float | None = None
    error: float | None = None

    @property
    def ratio(self) -> float:
        """Median over rounds of ours / baseline, or of baseline / ours for a lower bound."""
        return statistics.median(
            theirs / own if self.at_least is not None else own / theirs for own, theirs in zip(self.ours, self.baselines, strict=True)
        )

    def row(self) -> dict[str, Any]:
        described = {name: getattr(self, name) for name in ("part", "name", "baseline", "at_most", "at_least", "error", "ratio", "kept")}
        return {**described, "ours": statistics.median(self.ours), "baselines": statistics.median(self.baselines), "rounds": len(self.ours)}

    @property
    def kept(self) -> bool:
        return (self.at_most is None or self.ratio <= self.at_most) and (self.at_least is None or self.ratio >= self.at_least)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts to run")
    parser.add_argument("--rounds", type=int, default=7, help="number of measurements of each candidate")
    parser.add_argument("--check", action="store_true", help="exit with an error if a ratio misses its bound")
    parser.add_argument("--output", help="results file (default: benchmarks/results/speed.json if every part is run, otherwise none)")
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
        results: dict[str, Any] = {"cases": [case.row() for case in cases]}
        if whole:
            results["growth"] = growth_of_cost()
            growth_figure(target.with_suffix(".png"), results["growth"])
        write_result(target, "speed", results)
    broken = [case for case in cases if not case.kept]
    if args.check and broken:
        sys.exit(f"{len(broken)} of {len(cases)} ratios miss their bounds")


def processor() -> str:
    """The kind of this processor, which determines bounds: "AMX", "AVX512" or "other"."""
    information = Path("/proc/cpuinfo")
    if information.is_file() and "amx_tile" in information.read_text():
        return "AMX"
    return "AVX512" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "other"


def line(case: Case) -> str:
    """One line of text about a measured ratio and its bound."""
    bound = f"<= {case.at_most}" if case.at_most is not None else f">= {case.at_least}" if case.at_least is not None else ""
    meaning = "less than" if case.at_least is not None else "as much as"
    return f"{case.name:<58} {case.ratio:8.3g} times {meaning} {case.baseline:<28} {bound:<8} {'' if case.kept else 'BOUND MISSED'}"


def interleaved(rounds: int, *works: Work, clock: Callable[[], float] = time.process_time) -> list[list[float]]:
    """Run functions in turn; the time of each in every round, in milliseconds (by default of CPU
    time)."""
    times: list[list[float]] = [[] for _ in works]
    for work in works:
        work()
    for _ in range(rounds):
        for work, own in zip(works, times, strict=True):
            started = clock()
            work()
            own.append(1e3 * (clock() - started))
    return times


def difference(ours: torch.Tensor, baseline: torch.Tensor, tolerance: float) -> float:
    """The largest difference of two outputs; exits if it exceeds the tolerance, because the time of
    a wrong output has no meaning."""
    error = (ours.double() - baseline.double()).abs().max().item()
    if not error <= tolerance:
        sys.exit(f"the outputs differ by {error}, but at most {tolerance} is allowed: nothing was timed")
    return error


def with_gradients(attend: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> Work:
    """A function that computes attention and the gradients of its inputs."""

    def work():
        return torch.autograd.grad(attend(*inputs).sum(), inputs)

    return work


def attention(rounds: int) -> Iterator[Case]:
    """Compare 1.5-entmax attention with scaled_dot_product_attention and with the entmax library in
    the same layer."""

    def ours(query, key, value):
        return hopfield_attention(query, key, value, alpha=1.5, scaling=0.125)

    def library(query, key, value):
        return entmax15(0.125 * query @ key.mT, dim=-1) @ value

    def softmax(query, key, value):
        return scaled_dot_product_attention(query, key, value)

    # Largest allowed cost compared with softmax, and smallest speed-up over the library; each
    # forward and with gradients.
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
            own, baselines = interleaved(rounds, work(ours), work(softmax))
            yield Case("attention", name, "scaled_dot_product_attention", own, baselines, at_most=at_most[index], error=error)
            own, baselines = interleaved(rounds, work(ours), work(library))
            yield Case("attention", name, "entmax library", own, baselines, at_least=at_least[index], error=error)

    ours_mb, baseline_mb = (attention_memory(name) for name in ("ours", "softmax"))
    name = f"memory (MB), attention {MEMORY_SHAPE}, with gradients"
    yield Case("attention", name, "scaled_dot_product_attention", [ours_mb], [baseline_mb], at_most=1.2)


def attention_memory(name: str) -> float:
    """Peak memory of attention and its gradients in a new process, in megabytes, without the
    inputs."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_attention_memory, (name,))


def _attention_memory(name: str) -> float:
    torch.set_num_threads(1)
    attend = partial(hopfield_attention, alpha=1.5) if name == "ours" else scaled_dot_product_attention
    with_gradients(attend, [torch.randn(1, 1, 2, 64, requires_grad=True) for _ in range(3)])()
    return _peak_of(with_gradients(attend, [torch.randn(MEMORY_SHAPE, requires_grad=True) for _ in range(3)]))


def folding(rounds: int) -> Iterator[Case]:
    """Compare a U-Hop ViT (alpha = 1) with folded feature maps with the ViT of transformers of the
    same size."""
    model = UHopViTModel(UHopViTConfig(**VIT, image_size=224, patch_size=16, feature_init="normal")).eval()
    folded = model.fold_feature_maps()
    baseline = ViTModel(ViTConfig(**VIT)).eval()
    images = torch.randn(8, 3, 224, 224)
    with torch.no_grad():
        error = difference(folded(images).last_hidden_state, model(images).last_hidden_state, 5e-6)
        times = interleaved(rounds, lambda: folded(images), lambda: baseline(images), lambda: model(images))
    yield Case("folding", "ViT, 3 layers of 384, folded", "transformers' ViT", times[0], times[1], at_most=1.03, error=error)
    yield Case("folding", "ViT, 3 layers of 384, not folded", "transformers' ViT", times[2], times[1])


def pdist_loss(features: torch.Tensor, reduce: Callable = torch.mean) -> torch.Tensor:
    """The average separation loss as in the authors' code, with `torch.pdist`."""
    return reduce(torch.pdist(normalize(features, dim=-1)).square().mul(-2.0).exp()).log()


def gradient_of(loss: Loss, features: torch.Tensor) -> Work:
    features = features.detach().requires_grad_()
    return lambda: torch.autograd.grad(loss(features), features)[0]


def separation(rounds: int) -> Iterator[Case]:
    """Compare separation losses and their gradients with implementations by `torch.pdist`."""

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
    for name, loss, baseline, shape, bound in losses:
        features = torch.randn(shape)
        error = difference(loss(features), baseline(features), 1e-5)
        works = [gradient_of(loss, features), gradient_of(baseline, features)]
        gradients = [work() for work in works]
        size = gradients[1].abs().max()
        error = max(error, difference(gradients[0] / size, gradients[1] / size, 1e-3))
        ours, baselines = interleaved(rounds, *works)
        yield Case("separation", f"separation loss, {name}", "torch.pdist", ours, baselines, at_least=bound or 1.0, error=error)
    ours_mb, baseline_mb = (peak_memory(loss, 8000) for loss in ("ours", "pdist"))
    yield Case("separation", "memory (MB), average, M 8000, D 128", "torch.pdist", [ours_mb], [baseline_mb], at_least=10.0)
    yield Case("separation", "memory (MB), average, M 30000, D 128", "200 MB", [peak_memory("ours", 30000)], [200.0], at_most=1.0)


def sampling(rounds: int) -> Iterator[Case]:
    """Measure the error of a sampled separation loss, and its memory use for a million memories."""
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
    """Peak memory of a loss of `count` memories and its gradient in a new process, in megabytes."""
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
    """Peak memory of a function above `before` kilobytes (by default the current use), in
    megabytes."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS") if before is None else before
    work()
    return max(1, _status("VmHWM") - before) / 1024.0


def _status(name: str) -> int:
    """A memory value that Linux reports for this process, in kilobytes."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))


def retrieval(rounds: int) -> Iterator[Case]:
    """Compare retrieval with a loop over queries and with the matrix product alone.

    The loop computes the features of the memories again for each query, as the authors' code does.
    """
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
        ours, baselines = interleaved(rounds, lambda: memory(queries, output_energies=False), loop)
        yield Case("retrieval", "500 memories, 500 queries, D 784", "loop over queries", ours, baselines, at_least=90.0, error=error)
        memory = stored(100_000, 128)
        queries = normalize(memory.memories[:1000] + torch.randn(1000, 128), dim=-1)
        features = memory.stored_features()
        some = torch.arange(0, 1000, 50)
        error = difference(cast(torch.Tensor, memory.search(queries[some]).retrieved), memory(queries[some]).retrieved, 1e-5)

        def scores():
            for part in queries.split(160):
                part @ features.T

        ours, baselines = interleaved(rounds, lambda: memory.search(queries), scores)
        yield Case("retrieval", "100,000 memories, 1000 queries, D 128, exact", "bare product", ours, baselines, at_most=1.4, error=error)


def training(rounds: int) -> Iterator[Case]:
    """Compare a training step of a U-Hop ViT with that of the ViT of transformers, and a separation
    step with a training step."""
    images, labels = torch.randn(8, 3, 224, 224), torch.randint(10, (8,))
    bounds = {1.0: 1.15, 1.5: 1.5, 2.0: 1.5}
    baseline = ViTForImageClassification(ViTConfig(**VIT, id2label=TEN))
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

    separations = {"upstream": "all below", "feature_maps": "Phi alone"}
    works: list[Work] = [
        step_of(baseline),
        *(step_of(model) for model in models),
        *(partial(StageOne(models[1], parameters=moved, lr=0.0).step, {"pixel_values": images}) for moved in separations),
    ]
    taken, *ours = interleaved(rounds, *works)
    for (alpha, bound), own in zip(bounds.items(), ours[: len(models)], strict=True):
        yield Case("training", f"training step of a ViT, 3 layers of 384, alpha {alpha}", "transformers' ViT", own, taken, at_most=bound)
    for moved, own in zip(separations.values(), ours[len(models) :], strict=True):
        yield Case("training", f"separation step of the same, alpha 1.5, {moved}", "its training step", own, ours[1])


def adapters(rounds: int) -> Iterator[Case]:
    """Compare an adapter with LoRA of as many parameters in a training step, and a merged adapter
    with the stock model in inference.

    ViT has separate projections of queries and keys. GPT-2 has one for queries, keys and values.
    """
    gpt = GPT2Config(n_embd=VIT["hidden_size"], n_layer=VIT["num_hidden_layers"], n_head=VIT["num_attention_heads"])
    images, ids = {"pixel_values": torch.randn(8, 3, 224, 224)}, {"input_ids": torch.randint(1000, (8, 128))}
    models: list[tuple[str, Any, dict[str, Any], list[str]]] = [
        ("ViT", ViTModel(ViTConfig(**VIT)), images, ["q_proj", "k_proj"]),
        ("GPT-2", GPT2Model(gpt), ids, ["c_attn"]),
    ]
    for name, stock, batch, projections in models:
        stock.eval()
        for rank in (None, 8):
            adapted = get_peft_model(copy.deepcopy(stock), UHopAdapterConfig(rank=rank)).train()
            count = adapted.get_nb_trainable_parameters()[0]
            lora = LoraConfig(target_modules=projections, r=_rank_of_lora(stock, projections, count), fan_in_fan_out=name == "GPT-2")
            rival = get_peft_model(copy.deepcopy(stock), lora).train()
            ours, taken = interleaved(rounds, *(_step_of(model, batch) for model in (adapted, rival)))
            size = f"{count:,} beside {rival.get_nb_trainable_parameters()[0]:,} parameters"
            described = f"training step of {name}, {'square Phi' if rank is None else f'Phi of rank {rank}'}"
            yield Case("adapters", described, f"LoRA, {size}", ours, taken, at_most=1.15)
        merged = get_peft_model(copy.deepcopy(stock), UHopAdapterConfig()).merge_and_unload().eval()
        with torch.no_grad():
            error = difference(merged(**batch).last_hidden_state, stock(**batch).last_hidden_state, 5e-6)
            ours, taken = interleaved(rounds, lambda: merged(**batch), lambda: stock(**batch))  # noqa: B023
        yield Case("adapters", f"{name} with a merged adapter", "the stock model", ours, taken, at_most=1.02, error=error)


def _rank_of_lora(stock: Any, projections: list[str], count: int) -> int:
    """The rank at which LoRA on these projections has about `count` parameters."""
    widths = [sum(part.weight.shape) for name, part in stock.named_modules() if name.rpartition(".")[2] in projections]
    return round(count / sum(widths))


def _step_of(model: Any, batch: dict[str, Any]) -> Work:
    """A training step of an adapter."""
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)

    def step():
        model(**batch).last_hidden_state.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def gpu(rounds: int) -> Iterator[Case]:
    """Compare the Triton kernels and their gradients with FlashAttention and, if it is installed,
    adasplash.

    Without a GPU, nothing is timed.
    """
    if not torch.cuda.is_available():
        print("there is no GPU, so the Triton kernels are not timed")
        return
    yield from triton_kernels(rounds, [torch.randn(GPU_SHAPE, device="cuda", dtype=torch.bfloat16) for _ in range(3)], clock=gpu_clock)


def triton_kernels(rounds: int, inputs: list[torch.Tensor], clock: Callable[[], float]) -> Iterator[Case]:
    """The cases of `gpu` for given inputs: query, key and value in half precision."""
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
    baselines: dict[str, tuple[Callable[..., torch.Tensor], dict[str, float]]] = {"FlashAttention": (flash, {"at_most": 2.0})}
    if importlib.util.find_spec("adasplash") is not None:
        adasplash = importlib.import_module("adasplash")
        for name, attend in (("adasplash", adasplash.adasplash_v1), ("adasplash, no block mask", adasplash.adasplash_no_block_mask)):
            baselines[name] = partial(attend, alpha=1.5, is_causal=False), {"at_least": 1.0}
    what = f"1.5-entmax attention {tuple(inputs[0].shape)}, {str(inputs[0].dtype).removeprefix('torch.')}, with gradients"
    for baseline, (attend, bound) in baselines.items():
        if attend is not flash:
            difference_of(attend)
        own, theirs = interleaved(rounds, with_gradients(ours, inputs), with_gradients(attend, inputs), clock=clock)
        yield Case("gpu", what, baseline, own, theirs, error=error, **bound)


def gpu_clock() -> float:
    """The time in seconds, after the GPU has finished all its work."""
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
    "adapters": adapters,
    "gpu": gpu,
}


def growth_of_cost() -> dict[str, Any]:
    """The time of attention for each N and of the separation loss for each M, with gradients, in
    milliseconds."""
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
