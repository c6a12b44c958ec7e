"""The demo: a memory of digits, its energy landscape, a classifier's associations, bags of digits, and forecasts of a series.

python space/app.py
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any


# Gradio reads these variables when it is imported.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import demo_classifier
import demo_digits
import demo_forecast
import demo_landscape
import demo_links
import demo_models
import gradio as gr
from demo_bags import bag_view, empty_view, new_bag, weigh, with_digit, without_image
from demo_digits import DemoError
from demo_drawing import ALPHA, thumbnail
from demo_forecast import Forecaster
from demo_memory import CORRUPTIONS, METHODS, MemorySettings, headline, next_confused, side_view
from demo_models import SHIPPED, BagClassifier, Classifier, Once, digit_image


HERE = Path(__file__).parent
RUNS = HERE.parent / "runs"
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
CLICKED_BUTTON = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-index]");
  if (button) trigger("click", { index: Number(button.dataset.index) });
});
"""


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Show a `DemoError` to the visitor as a message."""
    try:
        yield
    except DemoError as error:
        raise gr.Error(str(error), print_exception=False) from error


def report_to(progress: gr.Progress) -> demo_models.Report:
    return lambda share, text: progress(share, desc=text)


def teach(text: str) -> None:
    gr.Markdown(text, elem_classes="hop-teach")


def same_in_code(tab: str) -> None:
    with gr.Accordion("The same in code", open=False, elem_classes="hop-same"):
        card(demo_links.code_view(tab))


def card(value: Any, sticky: bool = False, **options: Any) -> gr.HTML:
    """Our own HTML on a white card. A sticky card stays visible while the page of a phone scrolls."""
    return gr.HTML(value, apply_default_css=False, elem_classes="hop-card hop-sticky" if sticky else "hop-card", **options)


def slider(low: float, high: float, value: float, step: float, label: str, info: str) -> gr.Slider:
    return gr.Slider(low, high, value=value, step=step, label=label, info=info, buttons=[])


def retrieval_sliders(alpha: float, beta: float, most: float) -> tuple[gr.Slider, gr.Slider]:
    return (
        slider(1.0, 2.0, alpha, 0.1, f"{ALPHA}, sparsity", "1 (softmax) gives every memory some weight, 2 (sparsemax) only a few."),
        slider(1, most, beta, 1, "β, sharpness", "With a larger β, the best match gets more of the weight."),
    )


def on_any_change(controls: list[Any], answer: Callable[..., Any], inputs: list[Any], outputs: list[Any]) -> None:
    """Answer the latest position of the controls, and skip the positions on the way."""
    gr.on(
        [control.change for control in controls],
        answer,
        inputs,
        outputs,
        trigger_mode="always_last",
        show_progress="hidden",
        api_visibility="private",
    )


def memory_tab() -> None:
    start = MemorySettings()
    teach(
        "Each stored digit is asked for by a damaged copy of itself. If memories resemble each other, retrieval ends at another digit "
        "or in a mixture. A separation step learns a map Φ that tells them apart. Both sides get the same copies. The demo starts with "
        "the defaults of the package."
    )
    first = next_confused(start, -1) or 0
    overview = card(headline(start, first), sticky=True)
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            with gr.Group():
                count = slider(0, 300, start.count, 1, "M, stored digits", "How many digits the memory holds.")
                digit = slider(1, start.count, first + 1, 1, "Digit in the pictures", "Which of them the pictures follow.")
                with gr.Row():
                    confused = gr.Button("Next confused digit", size="sm")
                    others = gr.Button("Store other digits", size="sm")
            with gr.Group():
                corruption = gr.Radio(list(CORRUPTIONS), value=start.corruption, label="Damage of the query")
                amount = slider(0.0, 0.9, start.amount, 0.05, "Amount", "Share of pixels hidden, or noise relative to the digit.")
            with gr.Group():
                method = gr.Radio(list(METHODS), value=start.method, label="Separation (Stage I)")
                steps = slider(0, 300, start.separation_steps, 10, "N, separation steps", "Gradient steps that spread the memories.")
            with gr.Group():
                alpha, beta = retrieval_sliders(start.alpha, start.beta, 100)
                updates = slider(1, 8, start.update_steps, 1, "T, retrieval steps", "How often retrieval replaces the state.")
        with gr.Column(scale=8, min_width=300, elem_classes="hop-result"), gr.Row():
            with gr.Column(min_width=280):
                without = card(side_view(start, "without", first))
            with gr.Column(min_width=280):
                separated = card(side_view(start, "with", first))
    same_in_code("Memory")
    seed = gr.State(start.seed)
    controls = [count, corruption, amount, alpha, beta, updates, method, steps]
    outputs = [overview, without, separated]

    def settings_of(count, corruption, amount, alpha, beta, updates, method, steps, seed) -> MemorySettings:
        return MemorySettings(int(count), corruption, amount, alpha, beta, int(updates), method, int(steps), int(seed))

    def show(digit, *values) -> tuple[str, str, str]:
        settings = settings_of(*values)
        with errors_as_messages():
            place = min(max(int(digit), 1), max(1, settings.count)) - 1
            return headline(settings, place), side_view(settings, "without", place), side_view(settings, "with", place)

    def find_confused(digit, *values) -> int:
        with errors_as_messages():
            found = next_confused(settings_of(*values), int(digit) - 1)
        if found is None:
            gr.Info("No digit is confused without separation. Hide more, or store more digits.")
            return int(digit)
        return found + 1

    def fit(count, digit) -> Any:
        return gr.update(maximum=max(1, int(count)), value=min(int(digit), max(1, int(count))))

    on_any_change([digit, *controls, seed], show, [digit, *controls, seed], outputs)
    count.change(fit, [count, digit], digit, show_progress="hidden", trigger_mode="always_last", api_visibility="private")
    confused.click(find_confused, [digit, *controls, seed], digit, show_progress="hidden", api_visibility="private")
    others.click(lambda seed: seed + 1, seed, seed, show_progress="hidden", api_visibility="private")


def landscape_tab() -> None:
    alpha_start, beta_start, steps_start = 1.0, 35.0, 6
    teach(
        "Memories are points in the plane: **drag them**, and the query x. Retrieval runs downhill in the energy, dark is low. Crowded "
        "memories share valleys, so x may end at another memory. U-Hop+ turns their features apart until each has its own valley."
    )
    state = gr.State(demo_landscape.starting_points())
    first = demo_landscape.scene(demo_landscape.starting_points(), alpha_start, beta_start, steps_start, "energy")
    plane = card(first, html_template=demo_landscape.TEMPLATE, js_on_load=demo_landscape.SCRIPT, elem_id="landscape")
    with gr.Row():
        with gr.Column(min_width=280):
            alpha, beta = retrieval_sliders(alpha_start, beta_start, 80)
        with gr.Column(min_width=280):
            steps = slider(0, 12, steps_start, 1, "N, separation steps", "Steps of U-Hop+ that turn the features apart; 0 is none.")
            view = gr.Radio(
                [("energy", "energy"), ("basins of attraction", "basins")],
                value="energy",
                label="Ground",
                info="Energy, or the memory that each place is retrieved to; white is a mixture.",
            )
    with gr.Row():
        add = gr.Button("Add a memory")
        remove = gr.Button("Remove one")
        reset = gr.Button("Start again")
    same_in_code("Landscape")
    controls = [alpha, beta, steps, view]

    def draw(state, alpha, beta, steps, view) -> dict[str, Any]:
        with errors_as_messages():
            return demo_landscape.scene(state, alpha, beta, int(steps), view)

    def drag(alpha, beta, steps, view, event: gr.EventData) -> tuple[dict[str, Any], dict[str, Any]]:
        with errors_as_messages():
            dragged = demo_landscape.moved(event.points, event.query, event.stamp)
        return dragged, draw(dragged, alpha, beta, steps, view)

    def change(make, state, *values) -> tuple[dict[str, Any], dict[str, Any]]:
        with errors_as_messages():
            changed = make(state)
        return changed, draw(changed, *values)

    def start_again(state: dict[str, Any]) -> dict[str, Any]:
        return {**demo_landscape.starting_points(), "stamp": state["stamp"]}

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    on_any_change(controls, draw, [state, *controls], [plane])
    plane.input(drag, controls, [state, plane], trigger_mode="multiple", **quiet)
    for button, make in ((add, demo_landscape.with_another), (remove, demo_landscape.without_last), (reset, start_again)):
        button.click(partial(change, make), [state, *controls], [state, plane], **quiet)


def choices_view(chosen: int | None) -> str:
    """The example digits as buttons."""
    digits = demo_digits.load()
    cells = [
        f'<button type="button" data-index="{place}" aria-pressed="{str(place == chosen).lower()}" '
        f'aria-label="Classify this {digits.labels[index]}">{thumbnail(digits.images[index], "")}</button>'
        for place, index in enumerate(demo_digits.examples())
    ]
    return f'<div class="hop-choose">{"".join(cells)}</div>'


def classifier_tab(classifier: Once[Classifier]) -> None:
    with gr.Tab("Classify") as tab:
        teach(
            "The attention of this vision transformer is a Hopfield layer. Patches are memories, and the CLS token retrieves from them in "
            "every layer. The maps show what each head retrieves. A linear layer computes the scores from the CLS token."
        )
        chosen = gr.State(0)
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                choices = card(choices_view(0), js_on_load=CLICKED_BUTTON, elem_id="examples")
                upload = gr.UploadButton("Upload your own", file_types=["image"], elem_id="upload")
                gr.Markdown(
                    "One digit, dark on light or light on dark. The demo crops it and reduces it to the size that the model needs.",
                    elem_classes="hop-hint",
                )
            with gr.Column(scale=8, min_width=300, elem_classes="hop-result"):
                answer = card("", elem_id="answer", min_height=260)
        same_in_code("Classify")

    def show(place: int, progress: gr.Progress) -> str:
        with errors_as_messages():
            image = digit_image(demo_digits.load().images[demo_digits.examples()[place]])
            known = classifier(report_to(progress))
            return demo_classifier.answer_view(known, image, demo_classifier.classify(known, image))

    # gradio looks for a `Progress` among the defaults of a function that may report progress.
    def opened(place, progress=gr.Progress()) -> str:  # noqa: B008
        return show(place, progress)

    def picked(event: gr.EventData, progress=gr.Progress()) -> tuple[int, str, str]:  # noqa: B008
        return event.index, choices_view(event.index), show(event.index, progress)

    def uploaded(file: str, progress=gr.Progress()) -> tuple[str, str]:  # noqa: B008
        with errors_as_messages():
            image = demo_classifier.read_image(file)
            known = classifier(report_to(progress))
            if demo_classifier.reads_digits(known):
                image = demo_classifier.as_digit(image, demo_classifier.image_size(known))
            return choices_view(None), demo_classifier.answer_view(known, image, demo_classifier.classify(known, image))

    tab.select(opened, chosen, answer, api_visibility="private")
    choices.click(picked, None, [chosen, choices, answer], show_progress_on=answer, api_visibility="private")
    upload.upload(uploaded, upload, [choices, answer], show_progress_on=answer, api_visibility="private")


def bags_tab(classifier: Once[BagClassifier]) -> None:
    with gr.Tab("Bags") as tab:
        teach(
            "The model learned from labels of whole bags only: a bag is positive if a 9 is inside. A learned query retrieves from the bag. "
            "The weights say which images it retrieved. They do not prove that these images caused the answer."
        )
        bag, drawn = gr.State(new_bag(True, 4)), gr.State(4)
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                with gr.Row():
                    positive = gr.Button("New bag with a 9", variant="primary")
                    negative = gr.Button("New bag without")
                digit = gr.Radio([str(digit) for digit in range(10)], value="9", label="Digit to add", elem_id="digit_to_add")
                with gr.Row():
                    add = gr.Button("Add it")
                    clear = gr.Button("Empty the bag")
            with gr.Column(scale=8, min_width=300, elem_classes="hop-result"):
                view = card("", js_on_load=CLICKED_BUTTON, elem_id="bag", min_height=220)
        same_in_code("Bags")

    def show(bag: list[int], progress: gr.Progress) -> str:
        with errors_as_messages():
            known = classifier(report_to(progress))
            if not bag:
                gr.Warning("The bag is empty, so there is nothing to weigh. Add a digit, or draw a new bag.")
                return empty_view()
            return bag_view(bag, *weigh(known, bag), known.source)

    def opened(bag, progress=gr.Progress()) -> str:  # noqa: B008
        return show(bag, progress)

    def draw(positive, drawn, progress=gr.Progress()) -> tuple[int, list[int], str]:  # noqa: B008
        bag = new_bag(positive, drawn + 1)
        return drawn + 1, bag, show(bag, progress)

    def added(bag, digit, drawn, progress=gr.Progress()) -> tuple[list[int], str]:  # noqa: B008
        with errors_as_messages():
            bag = with_digit(bag, int(digit), drawn + len(bag))
        return bag, show(bag, progress)

    def removed(bag, event: gr.EventData, progress=gr.Progress()) -> tuple[list[int], str]:  # noqa: B008
        bag = without_image(bag, event.index)
        return bag, show(bag, progress)

    def emptied(progress=gr.Progress()) -> tuple[list[int], str]:  # noqa: B008
        return [], show([], progress)

    quiet: dict[str, Any] = {"show_progress_on": view, "api_visibility": "private"}
    tab.select(opened, bag, view, api_visibility="private")
    positive.click(partial(draw, True), drawn, [drawn, bag, view], **quiet)
    negative.click(partial(draw, False), drawn, [drawn, bag, view], **quiet)
    add.click(added, [bag, digit, drawn], [bag, view], **quiet)
    clear.click(emptied, None, [bag, view], **quiet)
    view.click(removed, bag, [bag, view], **quiet)


def forecast_tab(made: Once[Forecaster]) -> None:
    start = demo_forecast.made_series()
    with gr.Tab("Forecast") as tab:
        teach(
            "A small STanHop model stores windows of the first half of a series. The last "
            f"{demo_forecast.CONTEXT} steps retrieve the stored windows that resemble them, and the model forecasts the next "
            f"{demo_forecast.HORIZON} steps from both. It is trained here, in a few seconds."
        )
        own = gr.State(None)
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                with gr.Group():
                    series = gr.Radio(start.names, value=start.names[0], label="Series", elem_id="series")
                    place = slider(0, 100, 30, 1, "Start of the forecast", "Place in the last fifth of the series, in %.")
                    season = slider(
                        1, demo_forecast.CONTEXT, start.season, 1, "Season of the baseline", "The baseline repeats this number of steps."
                    )
                upload = gr.UploadButton("Upload your own CSV", file_types=[".csv"], elem_id="upload_series")
                again = gr.Button("Back to the made series", size="sm")
                gr.Markdown(
                    f"A row for each time step, oldest first, at least {demo_forecast.LEAST_ROWS}. Units in brackets in a name are shown.",
                    elem_classes="hop-hint",
                )
            with gr.Column(scale=8, min_width=300, elem_classes="hop-result"):
                view = card("", elem_id="forecast", min_height=260)
        same_in_code("Forecast")

    def of(own: Forecaster | None, progress: gr.Progress) -> Forecaster:
        return made(report_to(progress)) if own is None else own

    def show(own, series, place, season, progress=gr.Progress()) -> str:  # noqa: B008
        with errors_as_messages():
            known = of(own, progress)
            names = known.table.names
            # Between two series a change of one control may arrive before those of the others.
            return demo_forecast.view(known, names.index(series) if series in names else 0, place / 100, int(season))

    def uploaded(file: str, place, progress=gr.Progress()) -> tuple[Any, ...]:  # noqa: B008
        with errors_as_messages():
            table = demo_forecast.read_table(file)
            known = demo_forecast.train_forecaster(table, report_to(progress))
            shown = demo_forecast.view(known, 0, place / 100, table.season)
        return known, gr.update(choices=table.names, value=table.names[0]), table.season, shown

    def back(place, progress=gr.Progress()) -> tuple[Any, ...]:  # noqa: B008
        with errors_as_messages():
            shown = demo_forecast.view(of(None, progress), 0, place / 100, start.season)
        return None, gr.update(choices=start.names, value=start.names[0]), start.season, shown

    quiet: dict[str, Any] = {"show_progress_on": view, "api_visibility": "private"}
    tab.select(show, [own, series, place, season], view, **quiet)
    gr.on([series.input, place.input, season.input], show, [own, series, place, season], view, trigger_mode="always_last", **quiet)
    upload.upload(uploaded, [upload, place], [own, series, season, view], **quiet)
    again.click(back, place, [own, series, season, view], **quiet)


def build(classifier: Once[Classifier], bag_classifier: Once[BagClassifier], forecaster: Once[Forecaster]) -> gr.Blocks:
    with gr.Blocks(title="U-Hop: memories told apart", analytics_enabled=False) as demo:
        gr.Markdown(
            "# U-Hop: memories told apart\nA modern Hopfield layer is attention seen as associative memory. U-Hop separates the stored "
            "patterns before it retrieves from them ([2404.03827](https://arxiv.org/abs/2404.03827), [2410.23126](https://arxiv.org/abs/2410.23126)).",
            elem_classes="hop-intro",
        )
        with gr.Tabs():
            with gr.Tab("Memory"):
                memory_tab()
            with gr.Tab("Landscape"):
                landscape_tab()
            classifier_tab(classifier)
            bags_tab(bag_classifier)
            forecast_tab(forecaster)
    return demo


def theme() -> gr.themes.Base:
    """Quiet labels, and the fonts of the visitor's own system: nothing is fetched."""
    return gr.themes.Soft(
        primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate", font=FONTS, font_mono=["ui-monospace", "monospace"]
    ).set(
        block_title_background_fill="none",
        block_title_padding="0",
        block_title_text_color="*neutral_800",
        block_title_text_weight="600",
        block_title_background_fill_dark="none",
        block_title_text_color_dark="*neutral_100",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        button_large_text_size="*text_md",
        button_large_text_weight="500",
        button_large_padding="10px 16px",
        button_medium_text_weight="500",
        button_small_text_weight="500",
        # Text of at least 4.5:1, and borders that are seen, in both themes.
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_text_color="white",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_700",
        button_primary_text_color_dark="white",
        button_secondary_border_color="*neutral_400",
        button_secondary_border_color_dark="*neutral_500",
        button_border_width="1px",
        input_border_color="*neutral_400",
        input_border_color_dark="*neutral_500",
        input_border_width="1px",
        checkbox_label_border_width="1px",
        checkbox_label_border_color="*neutral_400",
        checkbox_label_border_color_dark="*neutral_500",
        checkbox_label_background_fill_selected="*primary_600",
        checkbox_label_background_fill_selected_dark="*primary_600",
        checkbox_label_text_color_selected="white",
        checkbox_label_text_color_selected_dark="white",
        slider_color="*primary_600",
        link_text_color_dark="*primary_300",
        link_text_color_hover_dark="*primary_200",
        link_text_color_active_dark="*primary_300",
        link_text_color_visited_dark="*primary_300",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
    )


def known(given: str | None, run: Path, shipped: Path, load: Callable[[str], Any]) -> Once[Any]:
    """The model that was given, else that of `run`, else the shipped one. It is read at the start, so that a mistake shows at once."""
    loaded = load(given or str(run if (run / "config.json").is_file() else shipped))
    return Once(lambda report: loaded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", help="address to listen on (this computer alone, unless GRADIO_SERVER_NAME says otherwise)")
    parser.add_argument("--port", type=int, help="port to listen on (the first free one from 7860)")
    parser.add_argument("--model", help="folder or Hub id of a UHopViTForImageClassification (runs/vit_digits, or the one in space/models)")
    parser.add_argument(
        "--bag_model", help="folder or Hub id of a UHopMILForBagClassification (runs/mil_digits, or the one in space/models)"
    )
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder that holds the runs vit_digits and mil_digits, if there are any")
    args = parser.parse_args()
    try:
        classifier = known(args.model, args.runs / "vit_digits", SHIPPED / "digits", demo_models.load_classifier)
        bag_classifier = known(args.bag_model, args.runs / "mil_digits", SHIPPED / "bags", demo_models.load_bag_classifier)
    except DemoError as error:
        sys.exit(f"error: {error}")
    forecaster = Once(partial(demo_forecast.train_forecaster, demo_forecast.made_series()))
    demo = build(classifier, bag_classifier, forecaster).queue(default_concurrency_limit=4)
    demo.launch(
        server_name=args.host,
        server_port=args.port,
        share=False,
        ssr_mode=False,
        theme=theme(),
        # Not as `css`, because gradio applies those rules only inside its own layout.
        head=f"<style>{(HERE / 'demo.css').read_text()}</style>",
        footer_links=[],
        run_history=False,
        app_kwargs={"routes": demo_links.routes()},
    )


if __name__ == "__main__":
    main()
