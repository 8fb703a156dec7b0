"""A bank of noises: what the reference predicts on an image's draws is computed once, and changes nothing but time."""

import multiprocessing
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import dkto.training.noise_bank as noise_bank
from dkto.training.loop import open_run, run_training, train
from dkto.training.step import denoising_errors


@pytest.fixture
def banked(config, prepared, tmp_path):
    """A training with two draws an image, on a copy of the data that no other test has a bank for."""
    shutil.copytree(prepared, tmp_path / "data")
    return replace(config, prepared_dir=tmp_path / "data", noise_bank=2, lora_rank=4, prompt_dropout=0.3)


def records(config, **changes):
    config = replace(config, **changes)
    return [{k: v for k, v in row.items() if k in ("loss", "global_step", "grad_norm")} for row in train(config)]


def files_of(config):
    return sorted((config.prepared_dir / noise_bank.FOLDER).rglob("*.safetensors"))


def test_a_bank_holds_what_the_reference_predicts(banked):
    run = open_run(banked)
    run.engine.start()
    without = run.batches.draw(3)
    run.batches.bank = noise_bank.fill_bank(run)
    batch = run.batches.draw(3)
    assert without.expected is None and torch.equal(batch.noisy_latents, without.noisy_latents)
    live, kept = denoising_errors(run, without), denoising_errors(run, batch)
    torch.testing.assert_close(kept.reference, live.reference, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kept.shift, live.shift, rtol=1e-3, atol=1e-5)


def test_an_image_has_so_many_draws_and_no_more(banked):
    batches = open_run(banked).batches
    rows = np.zeros(64, dtype=int)
    drawn = batches.draw_numbers(rows, np.arange(64) % 2)
    assert len(drawn.noisy_latents.flatten(1).unique(dim=0)) == 2
    again = batches.draw_numbers(rows[:3], np.array([1, 0, 1]))
    assert torch.equal(again.target[0], again.target[2]) and not torch.equal(again.target[0], again.target[1])
    assert torch.equal(again.target[0], drawn.target[1]), "row and number fix all, not the place in a batch"


def test_runs_share_a_bank_and_the_reference_works_once(banked, monkeypatch, tmp_path):
    first = records(banked, output_dir=tmp_path / "a")
    made = {path: path.stat().st_mtime_ns for path in files_of(banked)}
    assert made
    monkeypatch.setattr(noise_bank, "_of_row", lambda *_: pytest.fail("it is there"))
    assert records(banked, output_dir=tmp_path / "b") == first
    records(banked, output_dir=tmp_path / "c", beta=50.0, objective="sft_all")
    assert {path: path.stat().st_mtime_ns for path in files_of(banked)} == made


@pytest.mark.parametrize("change", [{"seed": 1}, {"noise_bank": 3}, {"prompt_dropout": 0.0}])
def test_what_changes_the_predictions_has_a_bank_of_its_own(banked, change):
    one, other = (noise_bank.bank_folder(open_run(each)) for each in (banked, replace(banked, **change)))
    assert one != other and one == noise_bank.bank_folder(open_run(replace(banked, beta=1.0)))


def test_a_run_that_was_stopped_goes_on_to_the_same_end(banked, tmp_path):
    whole = records(banked, output_dir=tmp_path / "whole")
    part = replace(banked, output_dir=tmp_path / "part")
    list(train(part, should_stop=lambda: True))
    rest = records(part)
    assert rest == whole[1:]


def _fill_and_die(config):
    done = []
    before = noise_bank._of_row

    def dies(*given):
        if len(done) == 3:
            os._exit(9)
        done.append(1)
        return before(*given)

    noise_bank._of_row = dies
    noise_bank.ROWS_PER_FILE = 2
    run_training(config)


def test_a_kill_leaves_whole_files_or_none(banked, tmp_path, monkeypatch):
    monkeypatch.setattr(noise_bank, "ROWS_PER_FILE", 2)
    process = multiprocessing.get_context("fork").Process(target=_fill_and_die, args=(banked,))
    process.start()
    process.join()
    assert process.exitcode == 9 and len(files_of(banked)) == 1
    assert records(banked) and len(files_of(banked)) > 1


def test_a_damaged_bank_is_refused_with_what_to_do(banked, tmp_path):
    records(banked, output_dir=tmp_path / "a")
    path = files_of(banked)[0]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{path.name} holds no noise bank.*remove that file"):
        records(banked, output_dir=tmp_path / "b")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"estimator": "unrelated"}, "noise_bank must be 0 for estimator 'unrelated'"),
        ({"objective": "dpo"}, "noise_bank must be 0 for dpo, whose pairs share their noise"),
        ({"objective": "dgpo"}, "noise_bank must be 0 for dgpo, whose groups share their noise"),
    ],
)
def test_where_noise_is_shared_there_is_no_bank(config, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(config, noise_bank=2, **changes)


def test_several_processes_have_no_bank(config):
    with pytest.raises(ValueError, match="noise_bank must be 0 on several processes"):
        replace(config, noise_bank=2).samples_per_rank(2)
