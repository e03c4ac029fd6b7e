"""What a wrong configuration is answered with."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from alphatoken.cli import readable_errors
from alphatoken.config.choices import OneOf, register
from alphatoken.config.estimators import ESTIMATORS
from alphatoken.config.evaluating import EvaluationRunConfig
from alphatoken.config.file import flat, load_config, may_change, save_config, sections_of, validate
from alphatoken.config.help import parse_arguments
from alphatoken.config.policies import POLICY_TRAITS
from alphatoken.config.preference import PreferenceRunConfig
from alphatoken.config.run import RunConfig
from alphatoken.config.sections import Section
from alphatoken.config.selection import SelectionConfig
from alphatoken.config.valuation import ValuationConfig
from alphatoken.distributed.settings import (
    KNOWN_KEYS,
    OUR_FIELDS,
    PARALLELISMS,
    deepspeed_config,
    without_ranks,
)
from alphatoken.errors import UserError
from alphatoken.selection.step import vetoes_on_b

CONFIGS = Path(__file__).parent.parent / "configs"

MINIMAL = """
model: {name_or_path: some/model}
data: {train: train.jsonl, validation: validation.jsonl}
train: {output_dir: runs/test}
"""


def one_of(names: Iterable[str]) -> str:
    """A choice, as messages word it."""
    *others, last = map(repr, names)
    return f"{', '.join(others)} or {last}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL)
    return path


def test_overrides_are_yaml_and_win(file: Path) -> None:
    config = load_config(
        RunConfig,
        file,
        ["optim.lr=3e-5", "valuation.layers=all", "data.train=[{path: a, weight: 2}, {path: b}]"],
    )
    assert config.optim.lr == 3e-5
    assert config.valuation.layers == "all"
    assert [source.path for source in config.data.train] == ["a", "b"]


def test_without_ranks_a_process_goes_on_unless_the_user_has_to_act(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, not_a_rank: None
) -> None:
    monkeypatch.setattr("sys.argv", ["recipe.py"])
    with readable_errors():
        pass
    with pytest.raises(SystemExit) as ended, readable_errors():
        raise UserError("what to do")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: what to do\nnext: python recipe.py --help\n"


def test_before_ranks_meet_one_of_each_machine_tells(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, not_a_rank: None
) -> None:
    monkeypatch.setattr("sys.argv", ["recipe.py"])
    monkeypatch.setattr("alphatoken.distributed.process.PATIENCE", 0.0)
    monkeypatch.setenv("RANK", "9")
    for local_rank, told in (("0", "error: rank 9: "), ("1", "")):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(SystemExit), readable_errors():
            raise UserError("no such file")
        assert capsys.readouterr().err.partition("no such file")[0] == told


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.glob("*/*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS))
)
def test_every_configuration_of_the_repository_is_valid(path: Path, file: Path) -> None:
    # A preset is a part: the file of the run has the rest.
    files = [path, file] if path.parent.name == "presets" else [path]
    config_class = EvaluationRunConfig if path.parent.name == "evaluation" else RunConfig
    load_config(config_class, files, with_section={"preference": PreferenceRunConfig})


def test_later_files_override_earlier_ones_key_by_key(file: Path, tmp_path: Path) -> None:
    preset, run = tmp_path / "preset.yaml", tmp_path / "run.yaml"
    preset.write_text("optim: {lr: 1.0e-3, clip: 0.5}\nvaluation: {layers: 2}\n")
    run.write_text("optim: {lr: 2.0e-3}\n")
    arguments = ["--config", str(preset), "--config", str(file), "--config", str(run)]
    config = parse_arguments(RunConfig, "A recipe.", [*arguments, "valuation.window=7"])
    assert config.optim.lr == 2e-3
    assert config.optim.clip == 0.5
    assert config.valuation.layers == 2
    assert config.valuation.window == 7
    assert config.model.name_or_path == "some/model"
    parted = [*arguments[:2], "optim.lr=1.0", *arguments[2:], "valuation.window=7"]
    config = parse_arguments(RunConfig, "A recipe.", parted)
    assert (config.optim.lr, config.valuation.window) == (1.0, 7), "keys may stand between files"


@pytest.mark.parametrize(
    ("preset", "selection"),
    [
        *itertools.product(
            ("drop_harmful", "paper"),
            (
                "{veto: {by: low_perplexity, share: 0.1}}",
                "{veto: {by: top_value, threshold: -1, unit: noise}}",
                "{threshold: 0.5, threshold_unit: noise}",
                "{schedule: linear, keep_ratio_start: 1.0, schedule_steps: 10}",
            ),
        ),
        ("paper", "{keep_ratio: auto, auto_margin: 2}"),
        ("paper", "{weights: softmax, weight_parameters: {temperature: 0.5}}"),
        *itertools.product(
            ("all_tokens", "held_out_veto"),
            (
                "{keep_ratio: auto, auto_margin: 2}",
                "{threshold: 0}",
                "{veto: {by: top_value, threshold: -1, unit: noise}}",
                "{weights: softmax, weight_parameters: {temperature: 0.5}}",
            ),
        ),
    ],
)
def test_a_rule_of_a_later_file_takes_the_place_of_another(
    preset: str, selection: str, file: Path, tmp_path: Path
) -> None:
    """With all that belongs to the other alone."""
    before, after = tmp_path / "before.yaml", CONFIGS / "presets" / f"{preset}.yaml"
    before.write_text(f"valuation: {{reliability: true}}\nselection: {selection}\n")
    chosen = load_config(RunConfig, [file, before, after]).selection
    assert chosen == load_config(RunConfig, [file, after]).selection


def test_a_branch_is_rid_of_what_belongs_to_the_shared_rule(file: Path) -> None:
    """A share that moves where reliability decides; parameters of weights only where the branch has
    other ones."""
    shared = "schedule: linear, keep_ratio_start: 1.0, keep_ratio: 0.5"
    weights = "weights: softmax, weight_parameters: {temperature: 0.5}"
    config = load_config(
        PreferenceRunConfig,
        file,
        [
            "valuation.reliability=true",
            f"selection={{{shared}, {weights}, chosen: {{keep_ratio: auto, weights: softmax}}, "
            "rejected: {weights: hard}}",
        ],
    )
    chosen, rejected = config.selections
    assert (chosen.keep_ratio, chosen.schedule, chosen.keep_ratio_start) == (
        "auto",
        "constant",
        None,
    )
    assert (rejected.keep_ratio, rejected.schedule) == (0.5, "linear")
    assert chosen.weight_parameters == {"temperature": 0.5}
    assert rejected.weight_parameters == {}


@pytest.mark.parametrize(
    "valuation",
    [
        "{contrast: 1, contrast_from: drawn}",
        "{contrast: 0.5, contrast_from: scored, contrast_memory: 0.9}",
        "{estimator: exact, parameters: all, layers: all, preconditioner: adam}",
    ],
)
def test_the_published_values_do_not_depend_on_the_file_of_the_run(
    valuation: str, file: Path, tmp_path: Path
) -> None:
    before, after = tmp_path / "before.yaml", CONFIGS / "presets" / "paper.yaml"
    before.write_text(f"valuation: {valuation}\n")
    alone = load_config(RunConfig, [file, after])
    assert load_config(RunConfig, [file, before, after]).valuation == alone.valuation


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (
            "{by: top_value, threshold: 0.1, unit: noise}",
            "{share: 0.2}",
            {"by": "top_value", "threshold": None, "share": 0.2, "unit": "raw"},
        ),
        (
            "{by: probability, share: 0.2}",
            "{threshold: 0.1}",
            {"by": "probability", "threshold": 0.1, "share": None, "unit": "raw"},
        ),
        (
            "{by: top_value, threshold: 0.1, unit: noise}",
            "{threshold: 0.2}",
            {"by": "top_value", "threshold": 0.2, "share": None, "unit": "noise"},
        ),
        (
            "{by: top_value, threshold: 0.1, unit: noise}",
            "{by: loss, threshold: 0.2}",
            {"by": "loss", "threshold": 0.2, "share": None, "unit": "raw"},
        ),
    ],
)
@pytest.mark.parametrize("section", ["selection", "selection.chosen"])
def test_a_veto_of_a_later_file_is_changed_key_by_key_or_replaced(
    section: str, before: str, after: str, expected: dict[str, Any], file: Path, tmp_path: Path
) -> None:
    """Whole where it names what it goes by, and by the other number where it has another one."""
    files = [file, tmp_path / "before.yaml", tmp_path / "after.yaml"]
    for path, veto in zip(files[1:], (before, after), strict=True):
        inner = f"{{veto: {veto}}}"
        if section == "selection.chosen":
            inner = f"{{chosen: {inner}}}"
        path.write_text(f"valuation: {{reliability: true}}\nselection: {inner}\n")
    config = load_config(PreferenceRunConfig, files).selection
    found = config.veto if section == "selection" else config.chosen.veto
    assert found is not None
    assert found.model_dump() == expected


def test_keys_of_one_rule_may_come_from_several_files(file: Path, tmp_path: Path) -> None:
    """What a later file says again, and what belongs to no other rule, takes nothing away."""
    files = [file]
    for number, selection in enumerate(
        (
            "{weight_parameters: {temperature: 0.5}, schedule: linear}",
            "{weights: softmax, keep_ratio_start: 1.0}",
            "{weights: softmax, keep_ratio: 0.25, threshold: null}",
        )
    ):
        files.append(tmp_path / f"{number}.yaml")
        files[-1].write_text(f"selection: {selection}\n")
    chosen = load_config(RunConfig, files).selection
    assert (chosen.weights, chosen.weight_parameters) == ("softmax", {"temperature": 0.5})
    assert (chosen.schedule, chosen.keep_ratio_start, chosen.keep_ratio) == ("linear", 1.0, 0.25)


def test_the_published_settings_are_those_of_the_paper(file: Path) -> None:
    """Appendix of arXiv 2606.01635; defaults may be others, the preset may not."""
    config = load_config(RunConfig, [CONFIGS / "presets" / "paper.yaml", file])
    valuation, fisher, selection = config.valuation, config.fisher, config.selection
    assert (valuation.estimator, valuation.layers, valuation.window) == ("ghost", 3, 32)
    assert (valuation.stability_weight, valuation.validation_sequences) == (1.5, 32)
    assert (selection.policy, selection.keep_ratio, selection.scope) == (
        "top_value",
        0.5,
        "micro_batch",
    )
    assert config.normalise == "kept"
    assert (fisher.num_prompts, fisher.max_prompt_tokens, fisher.max_new_tokens) == (1000, 256, 128)
    assert (config.optim.lr, config.train.global_batch_size, config.train.epochs) == (2e-5, 64, 3)


@pytest.mark.parametrize(
    "path",
    sorted([*CONFIGS.glob("sft/*.yaml"), *CONFIGS.glob("preference/*.yaml")]),
    ids=lambda path: str(path.relative_to(CONFIGS)),
)
def test_what_is_harmful_is_dropped_whatever_the_file_of_the_run_keeps(path: Path) -> None:
    preset = CONFIGS / "presets" / "drop_harmful.yaml"
    config = load_config(
        RunConfig, [path, preset], with_section={"preference": PreferenceRunConfig}
    )
    assert config.selection.keep_ratio == "auto"
    assert config.valuation.contrast == 0.75
    assert vetoes_on_b(config) is not None
    assert config.normalise == "response"


DROPPING = {"contrast": 0.75, "contrast_from": "drawn", "reliability": True, "keep_ratio": "auto"}
IMPROBABLE = {"by": "probability", "threshold": 1e-4, "share": None, "unit": "raw"}
PUBLISHED = {"contrast": 0, "contrast_from": "auto", "reliability": False, "keep_ratio": 0.5}


def what_chooses(config: RunConfig) -> dict[str, Any]:
    resolved = config.model_dump()
    both = {**resolved["valuation"], **resolved["selection"]}
    return {name: both[name] for name in (*DROPPING, "veto")}


@pytest.mark.parametrize(
    ("overrides", "differing"),
    [
        ([], {}),
        (["selection.protect_eos=true", "valuation.layers=2", "selection.scope=global_batch"], {}),
        (
            ["selection.policy=top_value", "selection.weights=hard", "selection.schedule=constant"],
            {},
        ),
        (["selection.policy=null", "selection.threshold=null", "selection.keep_ratio=null"], {}),
        (["selection.keep_ratio=auto"], {}),
        (["selection.normalise=response", "valuation.balance=std"], {}),
        (["valuation.estimator=exact", "valuation.layers=all"], {}),
        (["model.lora={r: 4}", "valuation.start_step=2"], {}),
        (["selection.veto=null"], {"veto": None}),
        (["selection.veto.threshold=1e-3"], {"veto": {**IMPROBABLE, "threshold": 1e-3}}),
        (
            ["selection.veto={by: loss, share: 0.1}"],
            {"veto": {"by": "loss", "threshold": None, "share": 0.1, "unit": "raw"}},
        ),
        (["valuation.contrast=1"], {"contrast": 1}),
        (["valuation.contrast=0"], {"contrast": 0, "contrast_from": "auto"}),
        (["valuation.contrast_from=scored"], {"contrast_from": "scored"}),
    ],
)
def test_what_is_left_out_drops_what_is_harmful(
    file: Path, tmp_path: Path, overrides: list[str], differing: dict[str, Any]
) -> None:
    config = load_config(RunConfig, file, overrides)
    assert what_chooses(config) == {**DROPPING, "veto": IMPROBABLE, **differing}
    save_config(config, tmp_path / "resolved.yaml")
    assert load_config(RunConfig, tmp_path / "resolved.yaml") == config
    if not differing:
        preset = CONFIGS / "presets" / "drop_harmful.yaml"
        kept = [each for each in overrides if not each.startswith("selection.keep_ratio")]
        expected = load_config(RunConfig, [file, preset], kept)
        assert what_chooses(config) == what_chooses(expected)


@pytest.mark.parametrize(
    ("overrides", "differing"),
    [
        (["selection.keep_ratio=0.5"], {}),
        (["selection.policy=loss"], {}),
        (["selection.threshold=0"], {"keep_ratio": None}),
        (["selection.weights=softmax"], {}),
        (["selection={schedule: linear, keep_ratio_start: 0.9}"], {}),
        (["valuation.enabled=false"], {}),
        (["valuation.held_out=train", "data.validation=null", "fisher.prompts=rows.jsonl"], {}),
        (["preference={}"], {}),
        (["selection.keep_ratio=0.5", "valuation.contrast=1"], {"contrast": 1}),
    ],
)
def test_another_rule_leaves_the_rest_as_published(
    file: Path, tmp_path: Path, overrides: list[str], differing: dict[str, Any]
) -> None:
    sections = {"preference": PreferenceRunConfig}
    config = load_config(RunConfig, file, overrides, with_section=sections)
    assert what_chooses(config) == {**PUBLISHED, "veto": None, **differing}
    save_config(config, tmp_path / "resolved.yaml")
    assert load_config(type(config), tmp_path / "resolved.yaml") == config


def test_sections_that_are_objects_are_completed_as_well(file: Path) -> None:
    config = load_config(RunConfig, file)
    sections = {name: getattr(config, name) for name in ("model", "data", "train")}
    given = ValuationConfig(layers=2)
    assert what_chooses(RunConfig(**sections, valuation=given)) == what_chooses(config)
    half = RunConfig(**sections, valuation=given, selection=SelectionConfig(keep_ratio=0.5))
    assert what_chooses(half) == {**PUBLISHED, "veto": None}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("quickstart", "auto"),
        ("llama3.1_8b_8gpu", "auto"),
        ("llama3.3_70b_4x8gpu", "auto"),
        ("gemma3_4b_magicoder", 0.5),
        ("smollm2_gsm8k", 0.5),
    ],
)
def test_files_that_ship_keep_what_they_say(
    monkeypatch: pytest.MonkeyPatch, name: str, expected: float | str
) -> None:
    monkeypatch.setenv("DATA_DIR", "rows")
    assert load_config(RunConfig, CONFIGS / f"sft/{name}.yaml").selection.keep_ratio == expected


@pytest.mark.parametrize("file_order", [("run", "paper"), ("paper", "run"), ("drop", "paper")])
def test_the_published_preset_is_so_in_any_order(file: Path, file_order: tuple[str, str]) -> None:
    presets = CONFIGS / "presets"
    files = {"run": file, "paper": presets / "paper.yaml", "drop": presets / "drop_harmful.yaml"}
    config = load_config(RunConfig, [file, *(files[each] for each in file_order)])
    assert what_chooses(config) == {**PUBLISHED, "veto": None}


def test_the_preset_of_a_model_of_the_held_out_rows_takes_the_place_of_the_others(
    file: Path,
) -> None:
    presets = CONFIGS / "presets"
    alone = load_config(RunConfig, [file, presets / "held_out_veto.yaml"])
    assert not alone.valuation.enabled
    assert alone.needs_reference
    for name in ("paper", "drop_harmful", "all_tokens"):
        files = [file, presets / f"{name}.yaml", presets / "held_out_veto.yaml"]
        config = load_config(RunConfig, files)
        assert config.selection == alone.selection
        assert config.valuation.start_step == 0


@pytest.mark.parametrize("value", ["[a]", "nothing", "null"])
def test_a_mistaken_estimator_is_told_by_its_key(file: Path, value: str) -> None:
    with pytest.raises(UserError, match=r"valuation.estimator: input should be 'ghost'"):
        load_config(RunConfig, file, [f"valuation.estimator={value}"])


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.glob("preference/*.yaml")), ids=lambda path: path.name
)
def test_the_published_settings_go_with_pairs(path: Path) -> None:
    load_config(PreferenceRunConfig, [CONFIGS / "presets" / "paper.yaml", path])


def test_a_mistake_in_one_of_several_files_names_them(file: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("optim: {lr: -1}\n")
    with pytest.raises(UserError) as failure:
        load_config(RunConfig, [file, wrong])
    assert f"{file} + {wrong}" in str(failure.value)
    assert "optim.lr: input should be greater than 0" in str(failure.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "preference.label_smoothing=0.1",
            "label_smoothing=0.1: only preference.objective=dpo reads this",
        ),
        ("preference.objective=simpoo", "preference.objective: input should be 'alpha_dpo', 'dpo'"),
        ("preference.beta=0", "preference.beta: input should be greater than 0"),
        (
            "selection.chosen.keep_ratio=0",
            "selection.chosen.keep_ratio: input should be greater than 0",
        ),
        (
            "selection.chosen.scope=sequence",
            "selection.chosen.scope: unknown key; did you mean selection.scope?",
        ),
        ("selection.normalise=kept", "the losses of pairs are divided by the number of pairs"),
        (
            "valuation={estimator: exact, contrast: 1, contrast_from: moment}",
            "valuation.contrast_from=moment: Adam's moment is of an objective per pair here",
        ),
        ("selection.rejected.schedule=cosine", "selection.rejected: selection.schedule=cosine and"),
        (
            "selection.rejected={policy: excess_loss}",
            "selection.policy=excess_loss needs reference.model",
        ),
        (
            "selection.rejected={policy: top_vlaue}",
            f"selection.rejected.policy: input should be {one_of(POLICY_TRAITS)}, not 'top_vlaue'",
        ),
        (
            "selection.chosen={policy: random, weights: sigmoid, keep_ratio: 1.0}",
            "needs a policy that ranks tokens",
        ),
        (
            "reference={mode: cached, offload: true}",
            "only reference.mode=online keeps a reference to offload",
        ),
        ("reference={mode: online, cache: here}", "reference.mode=online caches nothing"),
        ("reference=offline", "reference: input should be 'cached' or 'online', not 'offline'"),
    ],
)
def test_a_mistake_in_a_preference_run_is_named(file: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(PreferenceRunConfig, file, [override])
    assert message in str(error.value)


def test_branches_inherit_what_they_do_not_override(file: Path, tmp_path: Path) -> None:
    overrides = [
        "selection.keep_ratio=0.4",
        "selection.min_keep=2",
        "selection.rejected.keep_ratio=0.9",
        "reference=online",
    ]
    config = load_config(PreferenceRunConfig, file, overrides)
    chosen, rejected = config.selections
    assert (chosen.keep_ratio, chosen.min_keep) == (0.4, 2)
    assert (rejected.keep_ratio, rejected.min_keep) == (0.9, 2)
    assert config.reference.mode == "online"
    save_config(config, tmp_path / "resolved.yaml")
    assert load_config(PreferenceRunConfig, tmp_path / "resolved.yaml") == config


def test_a_branch_may_decide_how_many_are_kept_in_another_way(file: Path) -> None:
    shared = [
        "selection.schedule=linear",
        "selection.keep_ratio_start=1.0",
        "selection.weights=softmax",
        "selection.weight_parameters={cap: 3}",
        "selection.veto={by: loss, share: 0.1}",
    ]
    chosen = "selection.chosen={threshold: 0, veto: {by: probability, threshold: 0.1}}"
    rejected = "selection.rejected={weights: hard}"
    first, second = load_config(PreferenceRunConfig, file, [*shared, chosen, rejected]).selections
    assert (first.threshold, first.keep_ratio, first.schedule) == (0, None, "constant")
    assert (first.veto.by, first.veto.share) == ("probability", None)  # type: ignore[union-attr]
    assert (first.weights, first.weight_parameters) == ("softmax", {"cap": 3})
    assert (second.threshold, second.keep_ratio, second.schedule) == (None, 0.5, "linear")
    assert second.veto.by == "loss"  # type: ignore[union-attr]
    assert (second.weights, second.weight_parameters) == ("hard", {})


def test_a_branch_may_be_constant_where_the_rest_follows_a_schedule(file: Path) -> None:
    schedule = [
        "selection.schedule=linear",
        "selection.keep_ratio_start=1.0",
        "selection.schedule_steps=9",
    ]
    chosen, rejected = load_config(
        PreferenceRunConfig, file, [*schedule, "selection.chosen.schedule=constant"]
    ).selections
    assert (chosen.schedule, chosen.keep_ratio_start, chosen.schedule_steps) == (
        "constant",
        None,
        None,
    )
    assert (rejected.schedule, rejected.schedule_steps) == ("linear", 9)


def test_help_has_every_key_of_a_preference_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(PreferenceRunConfig, "What it does.", ["--help"])
    shown = "".join(capsys.readouterr().out.split())
    for key in (
        "preference.objective",
        "selection.rejected.keep_ratio",
        "reference.save_every",
        "train.keep_last",
    ):
        assert key in shown


def test_defaults_follow_the_objective(file: Path) -> None:
    def options(objective: str) -> tuple[float, float, bool]:
        config = load_config(PreferenceRunConfig, file, [f"preference.objective={objective}"])
        return config.preference.scale, config.preference.chosen_nll_weight, config.needs_reference

    assert options("alpha_dpo") == options("dpo") == (0.1, 0.0, True)
    assert options("simpo") == (2.0, 0.0, False)
    assert options("orpo") == options("cpo") == (0.1, 1.0, False)


def test_the_saved_configuration_reads_back_the_same(file: Path, tmp_path: Path) -> None:
    config = load_config(
        RunConfig,
        file,
        ["deepspeed.config={zero_optimization: {stage: 2}}", "optim.betas=[0.9, 0.95]"],
    )
    save_config(config, tmp_path / "resolved.yaml")
    assert load_config(RunConfig, tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "selection.keep_raito=0.5",
            "selection.keep_raito: unknown key; did you mean selection.keep_ratio?",
        ),
        ("train.lr=1e-5", "train.lr: unknown key; did you mean optim.lr?"),
        ("modle.dtype=float32", "modle: unknown key; did you mean model?"),
        (
            "optim.name=adafactor",
            "optim.name=adafactor is not possible here: it keeps the second moment of a matrix by",
        ),
        ("optim.name=muon", "optim.name=muon is not possible here: it makes the update of a whole"),
        ("optim.name=adamw8bit", "neither checkpoints, opened as tensors and numbers alone, nor"),
        ("optim.name=adm", "optim.name: input should be 'adamw', not 'adm'"),
        ("selection.keep_ratio=0", "selection.keep_ratio: input should be greater than 0, not 0"),
        (
            "selection.veto={by: probability, threshold: .nan}",
            "selection.veto.threshold: input should be a finite number, not nan",
        ),
        (
            "train.gradient_checkpointing={offload: true}",
            "train.gradient_checkpointing: input should be a valid boolean, not "
            "{'offload': True}; or input should be 'offload', not {'offload': True}",
        ),
        (
            "valuation.contrast=.inf",
            "valuation.contrast: input should be a finite number, not inf",
        ),
        (
            "selection.keep_ratio=1.5",
            "selection.keep_ratio: input should be less than or equal to 1, not 1.5",
        ),
        (
            "valuation.layers=0",
            "valuation.layers: input should be greater than or equal to 1, not 0",
        ),
        (
            "valuation.estimator=magic",
            f"valuation.estimator: input should be {one_of(ESTIMATORS)}, not 'magic'",
        ),
        (
            "valuation.parameters=all",
            "valuation.parameters=all: only valuation.estimator=exact reads this; with ghost leave "
            "it out",
        ),
        (
            "valuation={estimator: exact, window: 4, contraction: ghost}",
            "valuation.window=4 and valuation.contraction=ghost: only valuation",
        ),
        (
            "valuation={estimator: exact, preconditioner: sgd}",
            "input should be 'none' or 'adam', not 'sgd'",
        ),
        ("logging.every=true", "logging.every: input should be a valid integer, not True"),
        (
            "train.micro_batch_size=7",
            "train.global_batch_size=64 is not a multiple of train.micro_batch_size=7",
        ),
        ("data.validation=null", "valuation.enabled=true needs data.validation"),
        *(
            (f"{key}=[]", f"{key}: leave the key out or name a source, not []")
            for key in ("data.train", "data.validation", "data.eval", "fisher.prompts")
        ),
        ("model.name_or_path=null", "model.name_or_path: input should be a valid string, not None"),
        ("train.output_dir", "override 'train.output_dir' is not of the form section.key=value"),
        ("optim.lr=[", "override 'optim.lr=[': the value is not valid YAML"),
        (
            "model.chat_template_date=2026-13-45",
            "override 'model.chat_template_date=2026-13-45': the value is not valid YAML: "
            "'2026-13-45' is no timestamp: month must be in 1..12; text belongs in quotes",
        ),
        ("train.seed=!!int abc", "YAML: 'abc' is no int: invalid literal"),
        ("train.seed=!!int ''", "YAML: '' is no int; text"),
        ("train.seed=!!bool x", "YAML: 'x' is no bool; text"),
        ("model.chat_template_date=!!timestamp abc", "YAML: 'abc' is no timestamp; text"),
        ("train.seed=" + "1" * 5000, "1111...' is no int: Exceeds the limit"),
        ("train.seed=" + "[" * 5000, "the value is not valid YAML: it is nested too deeply"),
    ],
)
def test_a_mistake_is_named_with_its_key_and_value(file: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as failure:
        load_config(RunConfig, file, [override])
    assert message in str(failure.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["valuation.enabled=false", "selection.policy=top_value"],
            "selection.policy=top_value needs valuation.enabled",
        ),
        (
            ["train.save_every=3", "valuation.refresh_every=2"],
            "train.save_every=3 is not a multiple of",
        ),
        (
            ["valuation.balance=std", "valuation.split_terms=false"],
            "valuation.balance=std needs adaptation",
        ),
        (
            ["valuation.reference=somewhere"],
            "valuation.reference is given without valuation.fisher",
        ),
    ],
)
def test_settings_that_contradict_each_other(
    file: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_config(RunConfig, file, overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["selection.veto={by: loss}"], "threshold=None and share=None: set exactly one of them"),
        (
            ["selection.veto={by: loss, threshold: 1, share: 0.1}"],
            "threshold=1.0 and share=0.1: set exactly one of them",
        ),
        (
            ["selection.veto={by: loss, treshold: 1}"],
            "selection.veto.treshold: unknown key; did you mean selection.veto.threshold?",
        ),
        (["selection.veto={by: random, share: 0.1}"], "selection.veto.by=random says nothing of"),
        (["selection.veto={by: all, threshold: 0}"], "selection.veto.by=all says nothing of"),
        (
            ["selection.veto={by: loss, share: 0.1, unit: noise}"],
            "only selection.veto.threshold has a unit",
        ),
        (
            ["selection.veto={by: loss, threshold: -1, unit: noise}"],
            "selection.veto.unit=noise needs a policy that sorts by values, not loss",
        ),
        (
            ["selection.veto={by: response_agreement, threshold: -1, unit: noise}"],
            "selection.veto.unit=noise needs a policy that sorts by values, not response_agreement",
        ),
        (
            [
                "selection.veto={by: adaptation, threshold: -1, unit: noise}",
                "valuation={reliability: true, balance: std}",
            ],
            "selection.veto.unit=noise with adaptation and valuation.balance=std would compare",
        ),
        (
            ["selection={keep_ratio: 0.5, veto: {by: top_value, threshold: -1, unit: noise}}"],
            "selection.veto.unit=noise needs to know how reliable values are: "
            "valuation.reliability=true",
        ),
        (
            ["selection.veto={by: adaptation, threshold: 0}", "valuation.split_terms=false"],
            "selection.veto.by=adaptation needs the terms of values: valuation.split_terms=true",
        ),
        (
            ["selection.veto={by: excess_loss, threshold: 0}"],
            "selection.veto.by=excess_loss needs reference.model",
        ),
        (
            ["selection.veto={by: top_value, threshold: 0}", "valuation.enabled=false"],
            "selection.veto.by=top_value needs valuation.enabled=true",
        ),
        (["selection.policy=agreement"], "selection.policy=agreement needs to know how reliable"),
        (
            ["selection={keep_ratio: 0.5, veto: {by: response_agreement, threshold: 0}}"],
            "selection.veto.by=response_agreement needs to know how reliable",
        ),
        (["valuation.reliability=false"], "selection.keep_ratio=auto needs to know how reliable"),
        (
            ["selection={keep_ratio: auto, policy: loss}", "valuation.reliability=true"],
            "selection.keep_ratio=auto drops harmful tokens: it needs selection.policy=top_value",
        ),
        (
            ["selection={keep_ratio: auto, schedule: linear, keep_ratio_start: 1.0}"],
            "selection.schedule=linear moves a share, but selection.keep_ratio=auto",
        ),
        (["selection.keep_ratio=most"], "selection.keep_ratio: input should be a valid number"),
        (
            ["selection={auto_margin: 2, keep_ratio: 0.5}"],
            "selection.auto_margin=2.0: only selection.keep_ratio=auto",
        ),
        (
            ["selection={threshold: 0, keep_ratio: 0.5}"],
            "selection.keep_ratio=0.5 and selection.threshold=0.0: set one of them",
        ),
        (
            ["selection.keep_ratio=null", "valuation.enabled=false"],
            "selection.keep_ratio=None and selection.threshold=None: set one of them",
        ),
        (
            ["selection={threshold: 0, policy: random}"],
            "selection.threshold=0.0 needs a policy whose sort key says something of a token",
        ),
        (
            ["selection={threshold: 0, threshold_unit: noise, policy: loss}"],
            "selection.threshold_unit=noise needs a policy that sorts by values, not loss",
        ),
        (
            ["selection={threshold: -1, threshold_unit: noise}"],
            "selection.threshold_unit=noise needs to know how reliable values are",
        ),
        (["selection.threshold_unit=noise"], "selection.threshold_unit=noise, but there is no"),
        (
            ["selection={weights: softmax, weight_parameters: {heat: 1}}"],
            "selection.weight_parameters has heat; those of selection.weights=softmax: "
            "temperature, cap",
        ),
        (
            ["selection={weights: softmax, weight_parameters: {cap: 0.5}}"],
            "selection.weight_parameters.cap=0.5: selection.weights=softmax needs at least 1",
        ),
        (["selection.weight_parameters={cap: 2}"], "those of selection.weights=hard: none"),
        (
            ["selection={weights: softmax, policy: all}"],
            "selection.weights=softmax needs a policy that ranks tokens, not all",
        ),
        (
            ["selection={normalise: kept, veto: {by: loss, share: 0.1}, threshold: 0}"],
            "selection.normalise=kept with selection.veto and selection.threshold: how many tokens "
            "are kept is not known before the first backward pass; set "
            "selection.normalise=response or selection.scope=global_batch",
        ),
        (
            ["valuation={start_step: 3, refresh_every: 2}"],
            "valuation.start_step=3 is not a multiple of valuation.refresh_every=2",
        ),
        (
            ["valuation={reliability: true, validation_sequences: 1}"],
            "valuation.reliability=true compares two halves of the held-out rows, but "
            "valuation.validation_sequences=1: set at least 2",
        ),
    ],
)
def test_what_does_not_go_together_in_a_selection(
    file: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError) as failure:
        load_config(RunConfig, file, overrides)
    assert message in str(failure.value)


def test_a_threshold_takes_the_place_of_the_ratio(file: Path, tmp_path: Path) -> None:
    config = load_config(RunConfig, file, ["selection.threshold=0"])
    assert (config.selection.keep_ratio, config.selection.ratio) == (None, 1.0)
    save_config(config, tmp_path / "resolved.yaml")
    assert load_config(RunConfig, tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("{}", "response"),
        ("{keep_ratio: 0.5}", "kept"),
        ("{weights: softmax}", "kept"),
        ("{normalise: response}", "response"),
        ("{veto: {by: loss, share: 0.1}}", "response"),
        ("{threshold: 0}", "response"),
        ("{threshold: 0, scope: global_batch, normalise: kept}", "kept"),
        ("{veto: {by: reference_probability, threshold: 0.4}, policy: all}", "response"),
    ],
)
def test_what_the_losses_are_divided_by(file: Path, selection: str, expected: str) -> None:
    assert load_config(RunConfig, file, [f"selection={selection}"]).normalise == expected


def test_the_starting_model_is_a_reference_where_none_is_given(file: Path) -> None:
    veto = "selection.veto={by: reference_probability, threshold: 0.4}"
    assert load_config(RunConfig, file, [veto]).needs_reference
    assert not load_config(RunConfig, file, []).needs_reference


def test_every_mistake_is_reported_at_once(file: Path) -> None:
    with pytest.raises(UserError) as failure:
        load_config(RunConfig, file, ["optim.lr=-1", "valuation.wnidow=3", "train.seed=x"])
    assert all(key in str(failure.value) for key in ("optim.lr", "valuation.window", "train.seed"))


FILES_AND_FOLDERS = (
    "model.name_or_path",
    "model.chat_template",
    "data.cache_dir",
    "deepspeed.config",
    "evaluation.compare_with",
    "evaluation.output",
    "fisher.output",
    "reference.cache",
    "reference.model",
    "selection.store",
    "train.output_dir",
    "train.resume",
    "valuation.fisher",
    "valuation.reference",
)


def test_every_path_may_begin_with_the_home_folder(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    overrides = [f"{key}=~/some/{key}" for key in FILES_AND_FOLDERS]
    found = flat(load_config(RunConfig, file, overrides).model_dump(mode="json"))
    assert {key: found[key] for key in FILES_AND_FOLDERS} == {
        key: f"{tmp_path}/some/{key}" for key in FILES_AND_FOLDERS
    }
    assert load_config(RunConfig, file).data.cache_dir == tmp_path / ".cache" / "alphatoken"


@pytest.mark.parametrize("key", FILES_AND_FOLDERS)
def test_a_path_that_names_nothing_is_refused(file: Path, key: str) -> None:
    for value in ("", "  "):
        with pytest.raises(UserError, match=rf"  {key}: .*not '{value}'"):
            load_config(RunConfig, file, [f"{key}='{value}'"])
    with pytest.raises(UserError, match=rf"  {key}: .*no user of this machine.*~no-body/x'"):
        load_config(RunConfig, file, [f"{key}=~no-body/x"])


@pytest.mark.parametrize("key", ["data.train", "data.validation", "data.eval"])
def test_rows_are_not_looked_for_in_the_folder_that_a_run_is_started_in(
    file: Path, key: str
) -> None:
    for value, message in (("''", "name or path, not ''"), ("~no-body/x", "no user of this")):
        with pytest.raises(UserError, match=rf"{key}\S*: .*{message}"):
            load_config(RunConfig, file, [f"{key}={value}"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {a: 1, a: 2}", "key 'a' is given twice"),
        ("- a list", "must hold sections"),
        ("model: [unclosed", "is not valid YAML"),
        ("train: {{ folder }}", r"\{'folder': None\} is no key"),
        ("? [a, b]\n: c", r"\['a', 'b'\] is no key"),
        ("# caf\udce9", "is not valid YAML, which is text in UTF-8"),
        (
            "model: {a: 1}\nb: 2026-13-45",
            r"'2026-13-45' is no timestamp: month must be (?s:.)*line 2",
        ),
        ("model: {<<: {a: 1}, <<: {b: 2}}", "key '<<' is given twice"),
        ("model: {<<: 4}", "expected a mapping or list of mappings for merging"),
        ("model: " + "[" * 5000, "is not valid YAML: it is nested too deeply"),
    ],
)
def test_a_broken_file_is_named(file: Path, text: str, message: str) -> None:
    file.write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=message) as failure:
        load_config(RunConfig, file)
    assert str(file) in str(failure.value)


def test_a_mapping_may_be_merged_into_others(file: Path) -> None:
    """Its own keys count before those merged into it, wherever YAML reads them first."""
    file.write_text(
        MINIMAL
        + """
selection:
  veto: {by: loss, share: 0.1}
  chosen: &chosen {<<: &base {keep_ratio: 0.2, min_keep: 3}, keep_ratio: 0.4}
  rejected: {<<: [*chosen, *base], min_keep: 5}
preference: {}
"""
    )
    chosen, rejected = load_config(PreferenceRunConfig, file).selections
    assert (chosen.keep_ratio, chosen.min_keep) == (0.4, 3)
    assert (rejected.keep_ratio, rejected.min_keep) == (0.4, 5)
    # The outer mapping is read before the inner one that it takes keys of.
    values = sections_of("a: {b: &b {<<: {k: 1, l: 2}, k: 3}}\nc: {<<: *b, l: 4}", file)
    assert values == {"a": {"b": {"k": 3, "l": 2}}, "c": {"k": 3, "l": 4}}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"cannot read the configuration .*nowhere.yaml: No such file"
    ):
        load_config(RunConfig, tmp_path / "nowhere.yaml")


def test_help_explains_every_key(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        parse_arguments(RunConfig, "A recipe.", ["--help"])
    printed = capsys.readouterr().out
    for section, info in RunConfig.model_fields.items():
        for key, field in info.annotation.model_fields.items():  # type: ignore[union-attr]
            assert f"{section}.{key} " in printed
            assert field.description, f"{section}.{key} does not say why it exists"
            assert field.description.split()[0] in printed


def test_what_may_differ_between_a_run_and_its_continuation(file: Path) -> None:
    """Exactly what changes nothing that is computed; a new key is refused until it is marked."""
    overrides = ["model.lora={r: 4}", "deepspeed.config={zero_optimization: {stage: 2}}"]
    config = load_config(PreferenceRunConfig, file, overrides)
    keys = flat(config.model_dump(mode="json"))
    assert {"model.lora.r", "selection.chosen.policy", "preference.beta"} <= keys.keys()
    assert {key for key in keys if may_change(PreferenceRunConfig, key)} == {
        "data.cache_dir",
        "data.workers",
        "deepspeed.timeout_minutes",
        "evaluation.allow_code_execution",
        "evaluation.batch_size",
        "evaluation.code_megabytes",
        "evaluation.code_seconds",
        "evaluation.compare_with",
        "evaluation.max_length",
        "evaluation.output",
        "evaluation.resamples",
        "evaluation.seed",
        "evaluation.tasks",
        "fisher.output",
        "fisher.save_every",
        "logging.every",
        "logging.name",
        "logging.project",
        "logging.report_to",
        "logging.responses",
        "logging.wandb",
        "model.attn_implementation",
        "reference.cache",
        "reference.offload",
        "reference.save_every",
        "selection.store",
        "train.eval_every",
        "train.evaluate",
        "train.grace_seconds",
        "train.keep_best",
        "train.keep_every",
        "train.keep_last",
        "train.output_dir",
        "train.resume",
        "train.resume_allow",
        "train.save_every",
        "train.sequence_parallel",
        "train.stop_after",
        "train.watchdog_seconds",
    }
    # Keys of an older version, which a checkpoint may have.
    assert may_change(RunConfig, "logging.gone")
    assert not any(may_change(RunConfig, key) for key in ("train.gone", "gone", "gone.save_every"))


def test_recomputation_is_on_or_off_or_on_the_host(file: Path) -> None:
    def read(text: str) -> bool | str:
        override = f"train.gradient_checkpointing={text}"
        return load_config(RunConfig, file, [override]).train.gradient_checkpointing

    assert [read(text) for text in ("true", "false", "offload")] == [True, False, "offload"]
    for wrong in ("ofload", "1", "null"):
        with pytest.raises(UserError, match=r"valid boolean, .*; or input should be 'offload'"):
            read(wrong)


def test_names_from_a_table_are_answered_like_those_of_a_literal() -> None:
    """A wrong policy or objective reads as it would if the names were fixed, and a name that is
    added later is accepted."""
    table = {"first": 1, "second": 2}

    class Fixed(Section):
        name: Literal["first", "second"] | None = None

    class Open(Section):
        name: Annotated[str, OneOf(table)] | None = None

    for wrong in ("frist", 3, True, ["first"]):
        with pytest.raises(UserError) as fixed:
            validate(Fixed, {"name": wrong}, "of the test")
        with pytest.raises(UserError) as open_:
            validate(Open, {"name": wrong}, "of the test")
        assert str(open_.value) == str(fixed.value)
    register(table, "third", 3, notion="number")
    assert validate(Open, {"name": "third"}, "of the test").name == "third"
    with pytest.raises(UserError, match="input should be 'first', 'second' or 'third', not 'x'"):
        validate(Open, {"name": "x"}, "of the test")
    with pytest.raises(ValueError, match="there is a number 'first' already"):
        register(table, "first", 1, notion="number")


def test_the_launchers_rank_is_accepted(file: Path) -> None:
    config = parse_arguments(
        RunConfig, "A recipe.", ["--local_rank=1", "--config", str(file), "optim.lr=1.0"]
    )
    assert config.optim.lr == 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"train_batch_size": 8},
            "sets 'train_batch_size'; remove it and set train.global_batch_size instead",
        ),
        ({"optimizer": {"type": "Adam"}}, "sets 'optimizer'; remove it and set optim"),
        ({"bf16": {"enabled": True}}, "set model.dtype instead"),
        (
            {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}},
            'reduce_bucket_size is "auto"',
        ),
        ({"sequence_parallel_size": 2}, "remove it and set train.sequence_parallel instead"),
        ({"tensor_parallel": {"autotp_size": 2}}, "not supported: tensor parallelism cuts linears"),
        ({"pipeline": {"stages": 2}}, "not supported: pipeline parallelism gives a rank some"),
        ({"expert_parallel": {"ep_size": 2}}, "not supported: expert parallelism shards experts"),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_nontrainable_weights": True}},
            "sets zero_optimization.zero_quantized_nontrainable_weights=true, which is not "
            "possible here: frozen weights would lie in int8",
        ),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 4}}, "mics_shard_size=4"),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "zenflow={"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu", "super_offload": True}}},
            "super_offload=true",
        ),
        (
            {"weight_quantization": {"quantized_initialization": {"num_bits": 8}}},
            "quantized_initialization={",
        ),
        ({"torch_autocast": {"enabled": True}}, "set model.dtype instead. Remove it"),
        ({"gradient_allreduce_op": "sum"}, 'gradient_allreduce_op="sum"'),
        ({"hybrid_engine": {"enabled": True}}, "hybrid_engine.enabled=true"),
        ({"compile": {"deepcompile": True}}, "compile.deepcompile=true"),
        ({"data_efficiency": {"enabled": True}}, "data_efficiency.enabled=true"),
        ({"checkpoint": {"writer": {"type": "fast"}}}, "checkpoint.writer={"),
        ({"checkpoint": {"use_node_local_storage": True}}, "use_node_local_storage=true"),
    ],
)
def test_deepspeed_keys_that_are_ours_are_refused(
    run_values: dict[str, Any], tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps(values))
    for given in (values, str(file)):
        config = RunConfig.model_validate({**run_values, "deepspeed": {"config": given}})
        with pytest.raises(UserError, match=message):
            deepspeed_config(config, world_size=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", 'must hold a mapping such as {"zero_optimization": {"stage": 3}}, not []'),
        ('"zero3"', 'must hold a mapping such as {"zero_optimization": {"stage": 3}}, not "zero3"'),
        ("# caf\udce9", "is not text in UTF-8"),
        ("{", "is not valid JSON"),
        ("[" * 200_000, "is nested too deeply"),
        ('{"zero_optimization": {"stage": ' + "1" * 5000 + "}}", "is not valid JSON"),
        (
            '{"zero_optimization": {"stage": 3, "stage": 1}}',
            "gives the key 'stage' twice: remove one of them",
        ),
    ],
    ids=["list", "string", "latin", "json", "deep", "long", "twice"],
)
def test_a_deepspeed_file_that_is_no_mapping_is_named(
    run_values: dict[str, Any], tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "deepspeed.json"
    file.write_text(text, errors="surrogateescape")
    config = RunConfig.model_validate({**run_values, "deepspeed": {"config": str(file)}})
    with pytest.raises(UserError) as failure:
        deepspeed_config(config, world_size=1)
    assert f"deepspeed.config {file} {message}" in str(failure.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"zero_optimisation": {"stage": 3}},
            "sets 'zero_optimisation', which DeepSpeed does not know and would pass over; did you "
            "mean zero_optimization?",
        ),
        ({"Zero-Optimization": {"stage": 3}}, "did you mean zero_optimization?"),
        ({"zero_optimizer": {"stage": 3}}, "did you mean zero_optimization?"),
        ({"zero": {"stage": 3}}, "did you mean zero_optimization?"),
        ({"wall_clock_breakdwon": True}, "did you mean wall_clock_breakdown?"),
        ({"stage": 3}, "did you mean zero_optimization.stage?"),
        (
            {"stage3_prefetch_bucket_size": 1},
            "did you mean zero_optimization.stage3_prefetch_bucket_size?",
        ),
        (
            {"zero_optimization": []},
            'sets zero_optimization=[]: write a mapping such as {"stage": 3}, or remove it',
        ),
        ({"zero_optimization": None}, "sets zero_optimization=null: write a mapping"),
        ({"zero_optimization": True}, "sets zero_optimization=true: write a mapping"),
        (
            {"zero_optimization": {"stage": "3"}},
            'sets zero_optimization.stage="3": write 0, 1, 2 or 3, without quotes',
        ),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage=true: write 0, 1, 2 or"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage=4: write 0, 1, 2 or 3"),
        (
            {"zero_optimization": {"stage": 3, "stge": 3}},
            "sets zero_optimization.stge, which DeepSpeed does not know; did you mean stage?",
        ),
        (
            {"zero_optimization": {"stage3_prefetch_bucket_sise": 3}},
            "did you mean stage3_prefetch_bucket_size?",
        ),
        (
            {"zero_optimization": {"offload_optimizer": "cpu"}},
            'sets zero_optimization.offload_optimizer="cpu": write a mapping, such as '
            '{"device": "cpu"}',
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            "sets zero_optimization.offload_optimizer.devise, which DeepSpeed does not know; did "
            "you mean device?",
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "disk"}}},
            "sets zero_optimization.offload_param.device=\"disk\": input should be 'none', 'cpu' "
            "or 'nvme'",
        ),
        (
            {"zero_optimization": {"reduce_bucket_size": -1}},
            "sets zero_optimization.reduce_bucket_size=-1: input should be greater than 0",
        ),
        (
            {"wall_clock_breakdown": False, "eigenvalue": {}},
            "sets eigenvalue={}, which is not accepted by DeepSpeed: Eigenvalue-based",
        ),
        ({"aio": [1]}, "sets aio=[1], which is not accepted by DeepSpeed: "),
    ],
)
def test_what_deepspeed_would_not_take_or_pass_over_is_refused(
    run_values: dict[str, Any], tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps(values))
    for given, origin in ((values, "deepspeed.config"), (str(file), f"deepspeed.config {file}")):
        config = RunConfig.model_validate({**run_values, "deepspeed": {"config": given}})
        with pytest.raises(UserError) as failure:
            deepspeed_config(config, world_size=1)
        assert str(failure.value).startswith(origin)
        assert message in str(failure.value)


def test_every_key_that_deepspeed_reads_is_known() -> None:
    """A misspelt one is told by those it is like."""
    read = set[str]()

    class Recorded(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            read.add(key)
            return super().get(key, default)

        def __contains__(self, key: object) -> bool:
            read.add(str(key))
            return super().__contains__(key)

        def keys(self) -> Any:
            return self

    DeepSpeedConfig(Recorded(train_micro_batch_size_per_gpu=1))
    assert "zero_optimization" in read
    assert read <= {*KNOWN_KEYS, *OUR_FIELDS, *PARALLELISMS}


def test_deepspeed_keys_that_are_not_ours_pass_through(run_values: dict[str, Any]) -> None:
    zero = {
        "zero_optimization": {"stage": 2, "zero_quantized_nontrainable_weights": False},
        "communication_data_type": "fp32",
        "gradient_allreduce_op": "mean",
        "compile": {"deepcompile": False},
        "_comment": "DeepSpeed passes over what it does not know",
        "remark": "so do we, where it is like none of its keys",
    }
    config = RunConfig.model_validate({**run_values, "deepspeed": {"config": zero}})
    complete = deepspeed_config(config, world_size=3)
    assert complete.items() >= zero.items()
    assert complete["gradient_accumulation_steps"] == 2


def test_batches_must_be_dealt_evenly_to_the_ranks(run_values: dict[str, Any]) -> None:
    config = RunConfig.model_validate(run_values)
    with pytest.raises(
        UserError, match=r"train.global_batch_size=12 is not a multiple of .* times 4 ranks = 8"
    ):
        deepspeed_config(config, world_size=4)


def test_groups_that_divide_rows_are_dealt_to_like_ranks(run_values: dict[str, Any]) -> None:
    """DeepSpeed is told the numbers that follow from all ranks, of which it knows nothing else."""
    train = run_values["train"] | {"sequence_parallel": 2}
    values = {**run_values, "train": train, "valuation": {"enabled": False}}
    config = RunConfig.model_validate(values)
    complete = deepspeed_config(config, world_size=4)
    assert complete["gradient_accumulation_steps"] == 3
    assert complete["train_batch_size"] == 3 * 2 * 4
    assert without_ranks(complete, config)["train_batch_size"] == 12
    with pytest.raises(UserError, match="sequence_parallel=2 does not divide the number of ranks"):
        deepspeed_config(config, world_size=3)
    with pytest.raises(UserError, match="times 4 groups of 2 ranks = 8"):
        deepspeed_config(config, world_size=8)
