"""`igpo generate`: where prompts come from, where completions go, and the view of the canvas."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from igpo.canvas import masked_canvases, with_hints
from igpo.cli import main
from igpo.config import Config, ConfigError, DataConfig
from igpo.config_io import dump
from igpo.generate import read_prompts, run
from igpo.options import GenerateOptions
from igpo.policy import load_tokenizer
from igpo.replay import Trace, colour


def test_one_prompt_gives_its_samples_on_standard_output(
    trained: Callable[..., Config], capsys: pytest.CaptureFixture
) -> None:
    texts = run(trained(), GenerateOptions(prompt="2 + 2?", num_samples=3))
    assert len(texts) == 3
    assert capsys.readouterr().out.count("> 2 + 2?") == 3


def test_files_of_prompts_give_jsonl_whatever_the_batch_size(
    trained: Callable[..., Config], tmp_path: Path
) -> None:
    plain, out = tmp_path / "prompts.txt", tmp_path / "deep" / "out.jsonl"
    plain.write_text("one\n\ntwo\nthree\n", encoding="utf-8")
    found = []
    for size in (1, 64):
        config = tmp_path / "config.yaml"
        config.write_text(dump(trained(f"rollout_batch_size={size}")), encoding="utf-8")
        words = [str(config), f"prompt_file={plain}", f"output_file={out}", "num_samples=2"]
        assert main(["generate", *words]) == 0
        found.append([json.loads(line) for line in out.read_text().splitlines()])
    assert found[0] == found[1]
    assert [(x["prompt"], x["sample"]) for x in found[0]] == [
        (p, i) for p in ("one", "two", "three") for i in (0, 1)
    ]


def test_jsonl_prompts_need_their_column_only(
    trained: Callable[..., Config], tmp_path: Path
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"q": "what?"}\n', encoding="utf-8")
    tokenizer = load_tokenizer(trained().model)
    (prompt,) = read_prompts(
        DataConfig(prompt_column="q"), GenerateOptions(prompt_file=str(path)), tokenizer
    )
    assert prompt.text == "what?"


def test_steps_are_lines_when_there_is_no_terminal(
    trained: Callable[..., Config], capsys: pytest.CaptureFixture
) -> None:
    run(trained(), GenerateOptions(prompt="2?", show_steps=True))
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line[:4].strip().isdigit()]
    assert [int(line[:4]) for line in steps] == [0, 1, 2, 3]
    assert steps[0].count("\u2591") > steps[2].count("\u2591")


def test_the_view_tells_masked_new_and_given_tokens_apart(trained: Callable[..., Config]) -> None:
    tokenizer = load_tokenizer(trained().model)
    a, b, c = (tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in "123")
    (prompt,) = read_prompts(DataConfig(), GenerateOptions(prompt="x"), tokenizer)
    mask, eos = tokenizer.mask_token_id, tokenizer.eos_token_id
    canvas = masked_canvases(
        [prompt], num_generations=1, completion_length=5, mask_id=mask, pad_id=tokenizer.pad_token_id, eos_id=eos
    )  # fmt: skip
    canvas = with_hints(canvas, torch.full((1, 5), a), torch.arange(5)[None] == 0)
    trace = Trace(canvas, "x", 4)
    for step, row in ((0, [a, mask, c, mask, mask]), (3, [a, b, c, mask, eos])):
        trace.see(step, torch.tensor([[*canvas.tokens[0, : canvas.prompt_length].tolist(), *row]]))
    text = trace.text(tokenizer)
    assert text.plain == "123\u2591"
    first, last = colour(0, 4), colour(3, 4)
    assert first != last
    assert [span.style for span in text.spans] == ["yellow", f"bold {last}", first, "dim"]


def test_the_replay_plays_every_step_and_ends_with_the_completion(
    trained: Callable[..., Config], tmp_path: Path
) -> None:
    path = tmp_path / "deep" / "replay.html"
    cfg = trained("remasking=rcr")
    texts = run(cfg, GenerateOptions(prompt="</script>2?", replay_file=str(path)))
    page = path.read_text(encoding="utf-8")
    assert page.count("</script>") == 2
    assert "http" not in page
    (trace,) = json.loads(re.findall(r'id="data">(.*?)</script>', page, re.DOTALL)[0])
    assert trace["prompt"] == "</script>2?"
    shown, taken_back = list(trace["start"]), 0
    assert shown == [None] * len(shown)
    for frame in trace["frames"]:
        for i, text in frame["set"]:
            taken_back += text is None
            shown[i] = text
    assert None not in shown
    # tokens are shown one by one: without the spaces between them, and special ones as they are
    assert re.sub(r"<\w+>|\s", "", "".join(shown).split("\u00b7")[0]) == texts[0].replace(" ", "")
    assert taken_back or len(trace["frames"]) == cfg.rollout.diffusion_steps + 1
    plain = run(cfg, GenerateOptions(prompt="</script>2?"))
    assert plain == texts


def test_a_model_and_distinct_samples_are_asked_for(
    tiny: Callable[..., Config], trained: Callable[..., Config]
) -> None:
    with pytest.raises(
        ConfigError, match="model_name_or_path must name the folder of a model for generate"
    ):
        run(tiny(), GenerateOptions(prompt="2?"))
    with pytest.raises(ConfigError, match=r"num_samples must be 1 at temperature 0, .* got 2"):
        run(trained("temperature=0"), GenerateOptions(prompt="2?", num_samples=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either prompt or prompt_file, got both or neither"),
        ({"prompt": "a", "prompt_file": "b"}, "either prompt or prompt_file"),
        ({"prompt": "  "}, "there is no prompt"),
        ({"prompt": "a", "num_samples": 0}, "num_samples must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(
    trained: Callable[..., Config], options: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(trained(), GenerateOptions(**options))
