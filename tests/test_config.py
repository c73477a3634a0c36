"""The configuration: every mistake named at once, numbers read as they were meant."""

from pathlib import Path

import pytest

from clinkd.config import (
    ComputeSection,
    ConfigError,
    RunConfig,
    check_config,
    load_config,
    to_yaml,
    with_values,
)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "")) == RunConfig()


def test_numbers_with_an_exponent_are_numbers(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "sft: {lr: 5e-5}\n"), ["reflect.optim.lr=1e-4", "run.name=other"])
    assert (config.sft.lr, config.reflect.optim.lr, config.run.name) == (5e-5, 1e-4, "other")


def test_all_mistakes_are_listed_at_once_with_path_and_hint(tmp_path: Path) -> None:
    path = write(tmp_path, "distill: {temprature: 2}\ncompute: {zero_stage: 7, workers: none}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert any("distill.temprature" in line and "did you mean temperature?" in line for line in lines)
    assert any("compute.zero_stage" in line for line in lines)
    assert any("compute.workers" in line for line in lines)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "just words"])
def test_what_is_no_mapping_is_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    assert "config.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(tmp_path / "absent.yaml")


def test_a_base_is_laid_under_and_a_circle_refused(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("run: {name: base, seed: 3}\n")
    config = load_config(write(tmp_path, "base: base.yaml\nrun: {name: over}\n"))
    assert (config.run.name, config.run.seed) == ("over", 3)
    (tmp_path / "base.yaml").write_text("base: config.yaml\n")
    with pytest.raises(ConfigError, match="back to itself"):
        load_config(tmp_path / "config.yaml")


def test_a_written_configuration_reads_back_the_same(tmp_path: Path) -> None:
    config = with_values(RunConfig(), {"rope.lambda_h": 1.5, "run.name": "x"})
    assert load_config(write(tmp_path, to_yaml(config))) == config


def test_a_swept_value_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"rope\.lambda_h"):
        with_values(RunConfig(), {"rope.lambda_h": -1.0})


@pytest.mark.parametrize("override", ["novalue", "=3", "run.name.first=2"])
def test_a_malformed_override_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError):
        load_config(write(tmp_path, "run: {name: a}\n"), [override])


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.parent.glob("configs/**/*.yaml")), ids=str)
def test_every_shipped_configuration_is_valid(path: Path) -> None:
    from clinkd.tune.ablation import arms
    from clinkd.tune.space import check_space

    config = load_config(path)
    if path.stem == "ablation":
        assert list(arms(config)) == ["sft", "guided", "distilled", "reflected", "all"]
    elif path.parent.name == "sweeps":
        check_space(config)
    if path.stem.startswith("qwen2_vl"):  # the released recipe
        optim = config.distill.optim
        assert (optim.batch_size, optim.accumulation, optim.lr, optim.epochs) == (2, 8, 5e-5, 3)
        assert (config.compute.zero_stage, config.compute.precision) == (3, "bf16")


def test_what_cannot_go_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"feed.pack_tokens: distill.teacher=online samples an answer to"):
        load_config(write(tmp_path, "feed: {pack_tokens: 512}\ndistill: {teacher: online}\n"))
    assert load_config(write(tmp_path, "feed: {pack_tokens: 512}\n")).feed.pack_tokens == 512
    with pytest.raises(ConfigError, match=r"min_pixels \(9\) is above max_pixels \(4\)"):
        load_config(write(tmp_path, "model: {min_pixels: 9, max_pixels: 4}\n"))


def test_the_students_own_answers_need_a_teacher_that_is_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="on_policy above 0 needs teacher: online") as caught:
        load_config(write(tmp_path, "distill: {on_policy: 0.5}\n"))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="on_policy above 0 needs a above 0"):
        load_config(write(tmp_path, "distill: {on_policy: 0.5, teacher: online, a: 0}\n"))
    whole = load_config(write(tmp_path, "distill: {on_policy: 0.5, teacher: online}\n"))
    assert whole.distill.on_policy == 0.5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("reflect: {share: 0.7, replay: 0.4}\n", "more than 1 together"),
        ("reflect: {corrector: some, exercises: {steps: 9}}\n", "either corrector"),
        ("reflect: {target: texts}\n", "reflect.target"),
    ],
)
def test_what_cannot_go_together_in_reflection_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(write(tmp_path, text))


def test_naming_one_size_of_the_teacher_leaves_the_others(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "teacher: {tiny: {hidden: 64}}\n"))
    assert (config.teacher.tiny.hidden, config.teacher.tiny.layers) == (64, RunConfig().teacher.tiny.layers)


@pytest.mark.parametrize(
    ("workers", "gpus", "actors", "each"),
    [(2, 0, 2, 0), (1, 1, 2, 0.5), (8, 1, 8, 1), (8, 1, 3, 1), (2, 0.5, 4, 0.25)],
)
def test_a_model_actor_gets_a_part_of_the_workers_gpus_and_one_at_most(
    workers: int, gpus: float, actors: int, each: float
) -> None:
    """Ray refuses 2.67 GPUs, and an actor's model lies on one."""
    assert ComputeSection(workers=workers, gpus_per_worker=gpus, actors=actors).gpus_per_actor == each


def test_muon_is_refused_where_zero_cuts_matrices_apart() -> None:
    muon = {"distill": {"optim": {"muon_lr": 0.02}}}
    with pytest.raises(ConfigError, match=r"distill\.optim\.muon_lr=0\.02: ZeRO stage 1 cuts matrices apart"):
        check_config(muon, "mine.yaml")
    assert check_config(muon | {"compute": {"zero_stage": 0}}, "mine.yaml").distill.optim.muon_lr == 0.02
