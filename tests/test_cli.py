"""The command line: exit codes, one line for each mistake, nothing heavy before it is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clinkd import cli, cli_data, cluster
from clinkd.config import ConfigError, RunConfig, load_config, read_yaml

TINY = Path(__file__).parent.parent / "configs" / "tiny.yaml"
VG_ROWS = Path(__file__).parent / "golden" / "evaluation" / "vg.jsonl"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def mistakes(err: str) -> list[str]:
    lines = err.splitlines()
    assert lines and all(line.startswith("error: ") for line in lines), err
    return lines


def test_importing_the_command_line_imports_nothing_heavy() -> None:
    heavy = ("torch", "ray", "transformers", "pyarrow")
    code = f"import sys, clinkd.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_teaches_the_way_of_the_data() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "clinkd", "--help"],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "100"},
    )
    assert done.returncode == 0
    for word in ("prepare", "guide", "teacher", "label", "distill", "reflect", "evaluate", "report"):
        assert word in done.stdout
    assert "pseudo-labels, teacher cache\n" in done.stdout  # the drawing keeps its lines


@pytest.mark.parametrize(
    "arguments",
    [("nonsense",), ("evaluate", "--task", "vg"), ("prepare", "--out", "x", "--seed", "a"), ("--nope",)],
)
def test_a_mistyped_command_is_one_line_and_2(capsys, arguments: tuple[str, ...]) -> None:
    code, _, err = run(capsys, *arguments)
    assert code == 2 and len(mistakes(err)) == 1


# config
def test_config_prints_the_resolved_configuration(capsys, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("distill: {a: 0.7}\n")
    code, out, _ = run(capsys, "config", tmp_path / "a.yaml", "distill.optim.lr=5e-5", "run.name=x")
    assert code == 0
    resolved = RunConfig.model_validate(read_yaml(out, "printed"))
    assert (resolved.distill.a, resolved.distill.optim.lr, resolved.run.name) == (0.7, 5e-5, "x")


def test_config_lists_all_mistakes(capsys, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("distill: {tempratur: 1}\ncompute: {workers: 0}\n")
    code, out, err = run(capsys, "config", tmp_path / "a.yaml", "reflect.weight=2")
    lines = mistakes(err)
    assert code == 2 and out == "" and len(lines) == 3
    assert any("distill.tempratur" in line and "did you mean temperature?" in line for line in lines)


def test_a_missing_config_is_2(capsys, tmp_path: Path) -> None:
    code, _, err = run(capsys, "config", tmp_path / "none.yaml")
    assert code == 2 and len(mistakes(err)) == 1


# evaluate
def test_evaluate_prints_json_or_a_table(capsys) -> None:
    code, out, _ = run(capsys, "evaluate", "--task", "vg", "--predictions", VG_ROWS, "--json")
    result = json.loads(out)
    assert code == 0 and "recall_at_50" in result["mean"]
    code, out, _ = run(capsys, "evaluate", "--task", "vg", "--predictions", VG_ROWS)
    assert (
        code == 0
        and "recall_at_50" in out
        and "mean" in out
        and f"{result['mean']['recall_at_50']:.4f}" in out
    )


def test_evaluate_refuses_what_is_no_input(capsys, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    for task, path in (
        ("vg", tmp_path / "none.jsonl"),
        ("vg", tmp_path / "empty.jsonl"),
        ("xx", VG_ROWS),
        ("vg", tmp_path),
    ):
        code, out, err = run(capsys, "evaluate", "--task", task, "--predictions", path)
        assert code == 2 and out == "" and len(mistakes(err)) == 1


# prepare and validate
def test_prepare_makes_shards_that_validate_accepts(
    capsys, tmp_path: Path, ray_session: None, monkeypatch
) -> None:
    monkeypatch.setattr(cluster, "disconnect", lambda: None)  # the Ray of all tests stays
    out_dir = tmp_path / "data"
    code, out, err = run(
        capsys, "prepare", "--phantoms", 16, "--out", out_dir, "--seed", 3, "--test-fraction", 0.25
    )
    assert code == 0, err
    assert (out_dir / "manifest.json").is_file() and "16 images" in out and "prepare (write): done" in err
    code, out, _ = run(capsys, "validate", out_dir)
    assert code == 0 and "16 images" in out
    next((out_dir / "shards").glob("*.parquet")).unlink()
    code, _, err = run(capsys, "validate", out_dir)
    assert code == 2 and len(mistakes(err)) == 1


def test_validate_says_what_would_be_refused_and_keeps_nothing(
    capsys, tmp_path: Path, ray_session: None, monkeypatch
) -> None:
    from clinkd.data.phantoms import PhantomSpec, write_source

    monkeypatch.setattr(cluster, "disconnect", lambda: None)
    monkeypatch.setattr(cli_data, "new_folder", lambda prefix: str((tmp_path / "scratch").absolute()))
    write_source(PhantomSpec(images=8, size=64), tmp_path / "lab")
    next((tmp_path / "lab" / "images").glob("*.png")).write_bytes(b"")
    code, out, err = run(capsys, "validate", tmp_path / "lab")
    assert code == 0, err
    assert "7 images" in out and "zero_byte" in out
    assert not (tmp_path / "scratch").exists()


def test_a_source_that_is_not_there_is_2_at_once(capsys, tmp_path: Path) -> None:
    code, _, err = run(capsys, "prepare", "--source", tmp_path / "none", "--out", tmp_path / "out")
    assert code == 2 and len(mistakes(err)) == 1 and not (tmp_path / "out").exists()


def test_a_bucket_that_cannot_be_looked_into_is_2(capsys, monkeypatch) -> None:
    monkeypatch.setattr("clinkd.storage.ATTEMPTS", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "")  # taken back after the test, whatever the command sets
    arguments = ("--out", "x", "--source", "s3://bucket/data", "--endpoint-url", "http://127.0.0.1:9")
    code, _, err = run(capsys, "prepare", *arguments)
    assert code == 2 and "--endpoint-url" in err and len(mistakes(err)) == 1


# What nobody expected
def broken(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("clinkd.config.load_config", fail)


def test_an_unexpected_error_is_1_with_its_traceback_in_a_file(capsys, monkeypatch, tmp_path: Path) -> None:
    broken(monkeypatch, RuntimeError("the disk\nis full"))
    monkeypatch.setattr(cli.tempfile, "tempdir", str(tmp_path))
    code, _, err = run(capsys, "config", "x.yaml")
    assert code == 1 and len(mistakes(err)) == 1 and "RuntimeError: the disk" in err
    [log] = tmp_path.glob("clinkd-error-*.log")
    assert str(log) in err and "Traceback" in log.read_text()


def test_debug_shows_the_traceback_wherever_it_stands(capsys, monkeypatch) -> None:
    broken(monkeypatch, RuntimeError("boom"))
    code, _, err = run(capsys, "config", "x.yaml", "--debug")
    assert code == 1 and "Traceback" in err and err.splitlines()[-1] == "error: RuntimeError: boom"


def test_an_interrupt_is_130(capsys, monkeypatch) -> None:
    broken(monkeypatch, KeyboardInterrupt())
    code, _, err = run(capsys, "config", "x.yaml")
    assert code == 130 and err.splitlines()[-1] == "interrupted; the same command goes on from here"


# The cluster
def test_more_workers_than_cpus_is_one_line() -> None:
    with pytest.raises(ConfigError) as error:
        cluster.check_workers(8, 1, 2)
    assert str(error.value) == (
        "compute.workers: 8 workers of 1 CPU, but the cluster has 2; "
        "lower compute.workers or compute.cpus_per_worker"
    )
    cluster.check_workers(4, 0.5, 2)


def test_connect_checks_the_workers_against_a_running_ray(ray_session: None) -> None:
    cluster.connect(None, 2, 1)
    with pytest.raises(ConfigError, match="the cluster has 6"):
        cluster.connect(None, 7, 1)


@pytest.mark.parametrize(
    ("address", "said"),
    [("127.0.0.1:1", "nothing listens"), ("http://127.0.0.1:8265", "dashboard's address")],
)
def test_a_cluster_that_is_not_there_is_one_line(address: str, said: str) -> None:
    """In a process of its own: this one may have a Ray already."""
    code = f"from clinkd import cluster\ntry: cluster.connect({address!r})\nexcept ValueError as e: print(e)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert said in done.stdout and len(done.stdout.splitlines()) == 1


# certify


def test_certify_says_what_was_held_against_what(capsys, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("distill: {divergence: jsd, temperature: 2.0}\ncompute: {precision: bf16}\n")
    code, out, _ = run(capsys, "certify", path)
    assert code == 0 and "divergence jsd" in out and "bfloat16" in out and "certified" in out
    code, out, _ = run(capsys, "certify", path, "distill.cache.form=topk", "--json")
    assert code == 0 and json.loads(out)["loss"]["given"] == "topk" and json.loads(out)["ok"]


def test_a_loss_that_is_wrong_is_1_and_stops_the_run(capsys, tmp_path: Path, monkeypatch) -> None:
    from clinkd.distill import certificate
    from clinkd.stages.certificate import CertificateError, stamp

    right = certificate.distill_loss
    monkeypatch.setattr(
        certificate, "distill_loss", lambda *inputs, a, **options: right(*inputs, a=a + 0.1, **options)
    )
    path = tmp_path / "c.yaml"
    path.write_text("{}")
    code, out, _ = run(capsys, "certify", path)
    assert code == 1 and "FAILED" in out and "value off by" in out
    with pytest.raises(CertificateError, match="nothing was trained"):
        stamp(RunConfig(), tmp_path)
    assert json.loads((tmp_path / "certificate.json").read_text())["ok"] is False


def test_plan_says_what_reflection_generates(capsys) -> None:
    changes = ["reflect.rounds=2", "reflect.samples=100", "reflect.budget=30", "reflect.candidates=5"]
    code, out, _ = run(capsys, "plan", TINY, *changes, "reflect.validation=50")
    assert code == 0
    assert "at most 250 answers of the student" in out and "150 candidates" in out
    assert "at most 850 answers in 2 rounds" in out
    stages = [line.split()[0] for line in out.splitlines()[1:5]]
    assert stages == ["teacher", "distill", "reflect-1", "reflect-2"]
    assert "generates" not in run(capsys, "plan", TINY, "reflect.rounds=0")[1]


def test_compare_prints_both_runs_and_their_difference(capsys, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in VG_ROWS.read_text().splitlines()]
    worse = tmp_path / "worse"
    worse.mkdir()
    for row in rows[::2]:
        row["response"] = "I see."
    (worse / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = run(capsys, "compare", VG_ROWS, worse)
    assert code == 0 and "recall_at_50" in out and "95% interval" in out
    _, found, _ = run(capsys, "compare", VG_ROWS, "--with", worse, "--with", VG_ROWS, "--json")
    assert json.loads(found)["tasks"]["vg"]["no_box_rate"]["difference"] > 0
    for arguments in ([VG_ROWS], [VG_ROWS, tmp_path / "nowhere"], [VG_ROWS, tmp_path]):
        code, _, err = run(capsys, "compare", *arguments)
        assert code == 2 and len(mistakes(err)) == 1


@pytest.mark.parametrize("key", ["teacher.path", "reflect.corrector"])
def test_a_teacher_or_corrector_with_guided_positions_is_refused_before_anything_starts(
    tmp_path: Path, key: str
) -> None:
    from clinkd.stages.base import check_inputs

    given = [f"{key}={tmp_path}", f"model.path={tmp_path}"]
    config = {"model_type": "qwen2_vl", "rope_guidance": {"mode": "pair", "gamma": 0.25}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=rf"^{key}: .* guided by pair.* rope.gamma=0"):
        check_inputs(load_config(TINY, given))
    for unguided in ({"mode": "pair", "gamma": 0.0}, {"mode": "none", "gamma": 0.5}, None):
        (tmp_path / "config.json").write_text(json.dumps(config | {"rope_guidance": unguided}))
        check_inputs(load_config(TINY, given))
