"""Results files as Markdown tables."""

import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from modeling_uhop import UHopMemoryConfig

from ..intervals import paired_over_seeds


def results_table(results: list[dict[str, Any]]) -> str:
    """The table of results files of one kind: "seeds", "folds", "retrieval" or "speed".

    Raises:
        KeyError: For another kind.
    """
    tables: dict[str, Callable[[list[dict[str, Any]]], str]] = {
        "seeds": variants_table,
        "folds": bags_table,
        "retrieval": retrieval_table,
        "speed": speed_table,
    }
    return tables[results[0]["kind"]](results)


def variants_table(gathered: list[dict[str, Any]]) -> str:
    """A row for each variant, baseline and published figure, columns for each recipe and metric; one seed has no spread."""
    metrics = gathered[0]["sweep"]["metrics"]
    columns = [(result, metric) for result in gathered for metric in metrics]
    titles = ["" if len(gathered) == 1 else result["recipe"]["name"] + ", " for result, _ in columns]
    header = ["", "parameters", *(title + metric.replace("_", " ") for title, (_, metric) in zip(titles, columns, strict=True))]
    rows = []
    for variant in gathered[0]["variants"]:
        sizes = dict.fromkeys(f"{result['variants'][variant]['num_parameters']:,}" for result in gathered)
        cells = [r["variants"][variant]["metrics"][metric] for r, metric in columns]
        spreads = ["" if len(cell["values"]) == 1 else f" ± {cell['std']:.4f}" for cell in cells]
        rows.append([variant, " / ".join(sizes), *(f"{cell['mean']:.4f}{spread}" for cell, spread in zip(cells, spreads, strict=True))])
    for baseline in gathered[0]["baselines"]:
        errors = [r["baselines"][baseline].get(metric) for r, metric in columns]
        rows.append([baseline, "", *("" if error is None else f"{error:.4f}" for error in errors)])
    for source in dict.fromkeys(source for result in gathered for source in result["published"]):
        rows.append([f"published: {source}", "", *(str(r["published"].get(source, {}).get(metric, "")) for r, metric in columns)])
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def paired_table(gathered: list[dict[str, Any]]) -> str:
    """A row for each pair of variants, a column for each recipe and metric: mean difference at equal seeds, 95 % confidence interval."""
    metrics = gathered[0]["sweep"]["metrics"]
    columns = [(result, metric) for result in gathered for metric in metrics]
    titles = ["" if len(gathered) == 1 else result["recipe"]["name"] + ", " for result, _ in columns]
    header = ["", *(title + metric.replace("_", " ") for title, (_, metric) in zip(titles, columns, strict=True))]
    rows = []
    for first, second in gathered[0]["sweep"]["pairs"]:
        cells = []
        for result, metric in columns:
            pair = _pair(result, first, second, metric)
            cells.append(_difference(pair["difference"], pair["half_width"], 4))
        rows.append([f"{first} vs. {second}", *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def bags_table(gathered: list[dict[str, Any]]) -> str:
    """Mean of the metric that matters and its standard deviation over repeats, a column for each data set."""
    metric = gathered[0]["recipe"]["metrics"][0]
    titles = [Path(result["recipe"]["data"]["dataset"]).stem for result in gathered]
    lines = ["| | " + " | ".join(titles) + " |", "| --- |" + " --- |" * len(titles)]
    for job in dict.fromkeys(job for result in gathered for job in result["results"]):
        scores = [result["results"].get(job, {}).get(metric) for result in gathered]
        cells = ["" if score is None else f"{score['mean']:.3f}{_spread_over_repeats(score)}" for score in scores]
        lines.append(f"| {job} | " + " | ".join(cells) + " |")
    for row in dict.fromkeys(row for result in gathered for row in result["published"]):
        lines.append(f"| published: {row} | " + " | ".join(result["published"].get(row, "") for result in gathered) + " |")
    return "\n".join(lines)


def _spread_over_repeats(score: dict[str, Any]) -> str:
    """The standard deviation over repeats; nothing for one repeat, which has none."""
    return f" ± {score['std_repeats']:.3f}" if len(score["by_repeat"]) > 1 else ""


def instances_table(gathered: list[dict[str, Any]]) -> str:
    """AUC of the weights as a search for the instances that make a bag positive: a row for each simplex map, a column for each Phi."""
    (result,) = gathered
    maps = {"no Phi": "", "untrained Phi": ", untrained Phi", "U-Hop": ", U-Hop", "U-Hop+": ", U-Hop+"}
    rows = [["", *maps], ["---"] * (1 + len(maps))]
    for weights in ("dense", "1.5-entmax", "sparse"):
        found = [result["results"][weights + suffix]["instance_auc"] for suffix in maps.values()]
        rows.append([weights, *(f"{auc['mean']:.3f}{_spread_over_repeats(auc)}" for auc in found)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def speed_table(results: list[dict[str, Any]]) -> str:
    """Measured ratios of one results file beside their bounds."""
    (result,) = results
    lines = ["| what | beside | ratio | bound |", "| --- | --- | --- | --- |"]
    for case in result["cases"]:
        bound = "" if case["at_most"] is None and case["at_least"] is None else "≤ " if case["at_least"] is None else "≥ "
        bound += f"{case['at_most'] or case['at_least']:g}" if bound else ""
        ratio = f"{case['ratio']:.3g} times {'less' if case['at_least'] is not None else 'as much'}"
        lines.append(f"| {case['name']} | {case['baseline']} | {ratio} | {bound}{'' if case['kept'] else ', **missed**'} |")
    return "\n".join(lines)


# Models of the papers that only change the similarity.
BASELINES = ("polynomial", "cosine", "L2", "Manhattan")

# Where a retrieval table reads each experiment's axis, and how its columns name the place.
READ_AT = {
    "memory_size": ("M = ", ("100", "500")),
    "noise_level": ("noise ", ("0.5", "1")),
    "beta": ("beta ", ("3", "30")),
    "separation_steps": ("steps ", ("20", "100")),
}


def retrieval_table(results: list[dict[str, Any]], panel: str = "unit norm, beta 10") -> str:
    """Retrieval errors: a table for each results file, a row for each model, a column for each place on the axis and each alpha."""
    tables = []
    for result in results:
        if result["recipe"]["experiment"] == "separation_loss":
            tables.append(_correlation_table(result))
        else:
            tables.append(_retrieval_table(result, panel if panel in result["summary"] else next(iter(result["summary"]))))
    return "\n\n".join(tables)


def _retrieval_table(result: dict[str, Any], panel: str) -> str:
    prefix, values = READ_AT[result["recipe"]["experiment"]]
    columns = [(value, f"{alpha:g}") for value in values for alpha in result["recipe"]["alphas"]]
    lines = [
        f"| {_data_name(result)} | " + " | ".join(f"{prefix}{value}, alpha {alpha}" for value, alpha in columns) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    for model, by_alpha in result["summary"][panel].items():
        errors = [by_alpha.get(alpha, {}).get(value) for value, alpha in columns]
        lines.append(f"| {model} | " + " | ".join("" if error is None else mean_and_deviation(error) for error in errors) + " |")
    return "\n".join(lines)


def defaults_table(results: list[dict[str, Any]], sizes: tuple[str, ...] = ("100", "500")) -> str:
    """Retrieval errors with the package's defaults, beside the same memory without Phi and the best of the papers' baselines."""
    config = UHopMemoryConfig(pattern_dim=1)
    alpha, panel = f"{config.alpha:g}", f"unit norm, beta {config.beta:g}"
    lines = [
        f"| memories | no Phi, alpha 1 | no Phi, alpha {alpha} | best baseline, any beta | **defaults: denoising, alpha {alpha}** |",
        "| --- | --- | --- | --- | --- |",
    ]
    for result in results:
        errors = result["summary"][panel]
        for size in sizes:
            baselines = {
                f"{model}, {title}": models[model]["1"][size]
                for title, models in result["summary"].items()
                for model in models
                if model in BASELINES
            }
            best = min(baselines, key=lambda name: baselines[name]["mean"])
            cells = [mean_and_deviation(errors["no Phi"][each][size]) for each in ("1", alpha)]
            cells += [f"{mean_and_deviation(baselines[best])} ({best})", f"**{mean_and_deviation(errors['denoising'][alpha][size])}**"]
            lines.append(f"| {size} of {_data_name(result)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _data_name(result: dict[str, Any]) -> str:
    return result["recipe"]["data"]["dataset"].rpartition("/")[2]


def first_step_table(results: list[dict[str, Any]]) -> str:
    """How far the first step of U-Hop changes the retrieval error of no Phi, in per cent: a row for each data set and condition."""
    alphas = [f"{alpha:g}" for alpha in results[0]["recipe"]["alphas"]]
    lines = ["| data, condition | " + " | ".join(f"alpha {alpha}" for alpha in alphas) + " |", "| --- |" + " --- |" * len(alphas)]
    for result in results:
        for panel, models in result["summary"].items():
            changes = [models["U-Hop"][alpha]["1"]["mean"] / models["no Phi"][alpha]["1"]["mean"] - 1.0 for alpha in alphas]
            lines.append(
                f"| {_data_name(result)}, {panel} | " + " | ".join(f"{change:+.0%}".replace("%", " %") for change in changes) + " |"
            )
    return "\n".join(lines)


def _correlation_table(result: dict[str, Any]) -> str:
    """Rank correlations of separation loss and error, with their p-values: a row for each panel and model, a column for each alpha."""
    alphas = [f"{alpha:g}" for alpha in result["recipe"]["alphas"]]
    lines = [
        f"| {_data_name(result)} | " + " | ".join(f"alpha {alpha}" for alpha in alphas) + " |",
        "| --- |" + " --- |" * len(alphas),
    ]
    for panel, models in result["summary"].items():
        for model, by_alpha in models.items():
            cells = [f"{by_alpha[alpha]['spearman']:+.2f} (p = {by_alpha[alpha]['p']:.1g})" for alpha in alphas]
            lines.append(f"| {model}, {panel} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean_and_deviation(error: dict[str, float]) -> str:
    """A mean and its standard deviation, with three significant digits of the mean but at most four decimals."""
    digits = min(4, max(0, 2 - math.floor(math.log10(max(error["mean"], 1e-9)))))
    return f"{error['mean']:.{digits}f} ± {error['std']:.{digits}f}"


def choice_table(results: list[dict[str, Any]], most: int = 6) -> str:
    """The settings of a memory that retrieve best, by their mean rank over all conditions of the results files (rank 1 is the best)."""
    ranks = choice_ranks(results)
    conditions, candidates = len(next(iter(ranks.values()))), len(ranks)
    lines = [
        f"| method | alpha | beta | mean rank of {candidates}, over {conditions} conditions | worst rank |",
        "| --- | --- | --- | --- | --- |",
    ]
    for (model, alpha, beta), places in list(ranks.items())[:most]:
        lines.append(f"| {model} | {alpha:g} | {beta:g} | {sum(places) / len(places):.1f} | {max(places)} |")
    return "\n".join(lines)


def choice_ranks(results: list[dict[str, Any]]) -> dict[tuple[str, float, float], list[int]]:
    """The rank of every (method, alpha, beta) under each condition: a value of a results file. The best mean rank comes first."""
    ranks: dict[tuple[str, float, float], list[int]] = {}
    for result in results:
        for value in result["recipe"]["values"]:
            errors = {
                (model, float(alpha), result["recipe"]["panels"][panel]["beta"]): errors[f"{value:g}"]["mean"]
                for panel, models in result["summary"].items()
                for model, by_alpha in models.items()
                for alpha, errors in by_alpha.items()
            }
            for rank, settings in enumerate(sorted(errors, key=lambda settings: errors[settings]), start=1):
                ranks.setdefault(settings, []).append(rank)
    return dict(sorted(ranks.items(), key=lambda entry: sum(entry[1])))


BAGS = [f"mil_{name}" for name in ("tiger", "elephant", "fox", "ucsb", "musk1", "musk2", "digits")]
# The results files of the README's summary, and their kinds.
# The comparisons of adapters, and how the summary names their models and scores.
ADAPTERS = {
    "attach_images": ("a ViT", "accuracy"),
    "attach_text": ("a language model", "bits per byte"),
    "attach_series": ("a PatchTST", "squared error"),
}
HEADLINE = {
    "retrieval_memory_size_cifar10": "retrieval",
    "vit_cifar10_small_ways": "seeds",
    "vit_cifar10_small": "seeds",
    "vit_cifar10_small_10k": "seeds",
    **dict.fromkeys(BAGS, "folds"),
    "stanhop_etth1_96": "seeds",
    **dict.fromkeys(ADAPTERS, "seeds"),
}


def headline_table(results: dict[str, dict[str, Any]]) -> str:
    """What the separation step changes in each task, with its 95 % confidence interval, and what that means."""
    separated, more_epochs = "all below before training", "untrained Phi, 3 more epochs"
    small = "10,000 images: "
    rows = [
        _retrieval_row(results["retrieval_memory_size_cifar10"]),
        _images_row("1,000", results["vit_cifar10_small_ways"], separated, more_epochs),
        _images_row("5,000", results["vit_cifar10_small"], separated, more_epochs),
        _images_row("10,000", results["vit_cifar10_small_10k"], small + separated, small + more_epochs),
        _bags_row([results[name] for name in BAGS]),
        _forecasts_row(results["stanhop_etth1_96"]),
        *(_adapter_row(results[name], *said) for name, said in ADAPTERS.items()),
    ]
    header = ["task", "change with separation (95 % interval)", "what it means", "more"]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def _retrieval_row(result: dict[str, Any], size: float = 500) -> list[str]:
    """Errors of the default Stage I and of no feature map, at the default alpha and beta and on the same memories and queries."""
    config = UHopMemoryConfig(pattern_dim=1)
    alpha, panel = config.alpha, f"unit norm, beta {config.beta:g}"
    rows = [row for row in result["rows"] if (row["panel"], row["value"], row.get("alpha")) == (panel, size, alpha)]
    without, separated = ({row["repeat"]: row["error"] for row in rows if row["model"] == model} for model in ("no Phi", "denoising"))
    settings = f"alpha = {alpha:g}, beta = {config.beta:g}"
    task = f"retrieval of {size:g} CIFAR-10 images, half of each masked: squared error at {settings} (lower is better)"
    more = "[retrieval](docs/results/retrieval.md)"
    if not separated:
        return [task, "", "not measured at this alpha", more]
    pair = paired_over_seeds(list(separated.values()), [without[repeat] for repeat in separated])
    change = f"{_difference(*pair, 2)} (from {mean(without.values()):.2f} to {mean(separated.values()):.2f})"
    return [task, change, _verdict(-pair.mean, pair.half_width), more]


def _images_row(count: str, result: dict[str, Any], first: str, second: str) -> list[str]:
    pair = _pair(result, first, second, "test_accuracy")
    change = f"{_difference(100 * pair['difference'], 100 * pair['half_width'], 1)} points"
    task = f"{count} CIFAR-10 images: test accuracy, compared with 3 more epochs (equal compute)"
    return [task, change, _verdict(pair["difference"], pair["half_width"]), "[images](docs/results/images.md)"]


def _bags_row(gathered: list[dict[str, Any]]) -> list[str]:
    pairs = [pair for result in gathered for pair in result["paired"] if "U-Hop" in pair["first"] and "untrained Phi" in pair["second"]]
    clear = [pair for pair in pairs if abs(pair["difference"]) > pair["half_width"]]
    differences = [pair["difference"] for pair in pairs]
    task = f"bags, {len(gathered)} data sets: AUC, compared with an untrained Φ"
    meaning = f"no clear gain: {len(pairs) - len(clear)} of {len(pairs)} intervals contain 0"
    return [task, f"{min(differences):+.3f} to {max(differences):+.3f}", meaning, "[bags](docs/results/bags.md)"]


def _forecasts_row(result: dict[str, Any]) -> list[str]:
    pair = _pair(result, "U-Hop", "untrained Phi", "test_mse")
    task = "forecasts of ETTh1, 96 steps: MSE, compared with an untrained Φ (lower is better)"
    change = _difference(pair["difference"], pair["half_width"], 4)
    return [task, change, _verdict(-pair["difference"], pair["half_width"]), "[forecasts](docs/results/forecasts.md)"]


def _adapter_row(result: dict[str, Any], model: str, score: str) -> list[str]:
    (metric,) = result["sweep"]["metrics"]
    pair = _pair(result, "Phi, separation", "Phi without separation", metric)
    sign = 1 if score == "accuracy" else -1
    task = f"{model} moved to few examples by an adapter: {score}, compared with an untrained Φ (equal steps)"
    task += "" if sign > 0 else " (lower is better)"
    change = _difference(pair["difference"], pair["half_width"], 4)
    return [task, change, _verdict(sign * pair["difference"], pair["half_width"]), "[adapters](docs/results/adapters.md)"]


def _pair(result: dict[str, Any], first: str, second: str, metric: str) -> dict[str, Any]:
    asked = {"first": first, "second": second, "metric": metric}
    (pair,) = [pair for pair in result["paired"] if asked.items() <= pair.items()]
    return pair


def _difference(difference: float, half_width: float | None, digits: int) -> str:
    return f"{difference:+.{digits}f}" + ("" if half_width is None else f" ± {half_width:.{digits}f}")


def _verdict(gain: float, half_width: float | None) -> str:
    if half_width is None:
        return "one seed: no interval"
    if abs(gain) <= half_width:
        return "no clear gain: the interval contains 0"
    return "separation helps" if gain > 0 else "separation is worse"
