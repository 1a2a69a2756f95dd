"""The log of a run, a record for each step, and the programs that draw it."""

from __future__ import annotations

import json
import math
import sys
from types import SimpleNamespace

import pytest

from gptfast.training import sensors
from gptfast.training.log import Log, read_log
from tests.support.training import QUICK, make_trainer, resumed


def drawn(folder) -> dict[str, list[tuple[int, float]]]:
    """The scalars that TensorBoard reads."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_each_step_once_after_a_run_that_was_resumed_earlier(tmp_path):
    pytest.importorskip("tensorboard")
    first = make_trainer(tmp_path, QUICK.replace(checkpoint_every=3, eval_every=6, keep_last=2), tensorboard=True)
    save, saved = first._save, []
    first._save = lambda: saved.append(first.state.step) or (save() if len(saved) < 3 else None)  # 9 and 12 are lost
    first.train()
    resumed(tmp_path, QUICK.replace(eval_every=6), tensorboard=True).train()
    found, log = drawn(tmp_path / "tensorboard"), read_log(tmp_path / "log.jsonl")
    assert [r["step"] for r in log] == list(range(1, 13))
    for tag in ("loss", "grad_norm", "lr", "memory_gb"):
        assert [step for step, _ in found[tag]] == list(range(1, 13)), tag
        assert [value for _, value in found[tag]] == pytest.approx([r[tag] for r in log], rel=1e-6)
    assert [step for step, _ in found["val_loss"]] == [6, 12]
    speeds = [r["step"] for r in log if "tokens_per_second" in r]
    assert speeds and [step for step, _ in found["tokens_per_second"]] == speeds


def test_a_rewound_run_draws_its_steps_again(tmp_path):
    pytest.importorskip("tensorboard")
    trainer = make_trainer(tmp_path, QUICK.replace(on_spike="rewind", eval_every=6), tensorboard=True)
    add, calls = trainer.objective.add_gradients, []

    def spiking(*args):
        figures = add(*args)
        calls.append(figures["loss"])
        return {"loss": math.nan} if len(calls) == 8 else figures

    trainer.objective.add_gradients = spiking
    trainer.train()
    log = read_log(tmp_path / "log.jsonl")
    assert [r["step"] for r in log] == list(range(1, 13)) and [r["step"] for r in log if "rewound_from" in r] == [6]
    assert [step for step, _ in drawn(tmp_path / "tensorboard")["loss"]] == list(range(1, 13))


def test_wandb_and_trackio_get_the_numbers_by_step_under_one_name(tmp_path, monkeypatch):
    made, logged = [], []

    def init(**options):
        made.append(options)
        return SimpleNamespace(
            log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("end")
        )

    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=init))
        out = tmp_path / name
        make_trainer(out, QUICK.replace(max_steps=3), log_to=name).train()
        resumed(out, QUICK.replace(max_steps=4), log_to=name).train()
        assert made[0]["name"] == made[1]["name"] == (out / f"{name}-run").read_text().strip()
        assert made[0]["project"] == "gptfast" and made[0]["config"]["batch_size"] == 4
        assert made[1]["resume"] == "allow" and made[0].get("id") == (made[0]["name"] if name == "wandb" else None)
        ends = [n for n, entry in enumerate(logged) if entry == "end"]
        assert len(ends) == 2 and [e[0] for e in logged if e != "end" and "loss" in e[1]] == [1, 2, 3, 4]
        assert all(isinstance(v, (int, float)) for e in logged if e != "end" for v in e[1].values())
        made.clear(), logged.clear()


def test_a_program_that_is_not_installed_is_named(tmp_path, monkeypatch):
    for name in ("wandb", "trackio", "tensorboard"):
        for module in (name, "torch.utils.tensorboard"):
            monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=f"`{name}` needs a package .* pip install {name}"):
            make_trainer(tmp_path, log_to=name)
    make_trainer(tmp_path)._release()  # the folder was left free


def test_a_record_of_the_same_step_joins_the_last_one(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(
        '{"step": 1, "loss": 4.0}\n{"step": 1, "val_loss": 3.5}\n{"step": 2, "loss": 3.0}\n'
    )  # an older log
    log = Log(path, step=1)
    for record in ({"step": 2, "loss": 2.0}, {"step": 2, "val_loss": 2.5}, {"step": 3, "loss": 1.0}):
        log.write(**record)
    log.close()
    wanted = [
        {"step": 1, "loss": 4.0, "val_loss": 3.5},
        {"step": 2, "loss": 2.0, "val_loss": 2.5},
        {"step": 3, "loss": 1.0},
    ]
    assert [json.loads(line) for line in path.read_text().splitlines()] == wanted == log.records


def test_the_log_has_speed_share_of_the_peak_memory_and_temperature(tmp_path, monkeypatch):
    monkeypatch.setattr("gptfast.training.reporting.machine_figures", lambda device: {"cpu_temperature": 51.0})
    trainer = make_trainer(tmp_path, QUICK)
    trainer.peak_flops = 1e15
    monkeypatch.setattr("gptfast.training.loop.peak_flops", lambda *_, **__: 1e15)
    trainer.train()
    for record in read_log(tmp_path / "log.jsonl")[3:]:
        flops = record["tokens_per_second"] * trainer.model.flops_per_token(16)
        assert record["mfu"] == pytest.approx(flops / 1e15, abs=1e-4) and 0 <= record["mfu"] <= 1
        assert record["cpu_temperature"] == 51.0


def test_what_a_machine_does_not_tell_is_left_out(tmp_path):
    assert sensors.cpu_temperature(tmp_path) is None
    zone, chip = tmp_path / "b" / "thermal" / "thermal_zone0", tmp_path / "b" / "hwmon" / "hwmon1"
    for folder in (zone, chip):
        folder.mkdir(parents=True)
    (zone / "type").write_text("iwlwifi_1\n"), (zone / "temp").write_text("99000\n")  # not the CPU's
    (chip / "name").write_text("k10temp\n"), (chip / "temp1_input").write_text("61250\n")
    (chip / "temp3_input").write_text("58000\n")
    assert sensors.cpu_temperature(tmp_path / "b") == 61.25
    figures = sensors.machine_figures(SimpleNamespace(type="cpu"))
    assert 0.05 < figures["memory_gb"] <= figures["peak_memory_gb"] and "gpu_memory_gb" not in figures
