"""A bank of noises: what the frozen reference predicts on a fixed number of draws of each image, computed once.

The reference is a quarter of a full step and a third of one with LoRA, and it never changes. With
`TrainConfig.noise_bank` each image has that many draws of timestep, noise, dropped prompt and mirroring. Their
predictions lie beside the prepared feedback, for every run on it with the same model, seed and draws: other methods,
betas and rates of a sweep. Rows and draws of a step keep their address, so a resumed run sees the same.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from dkto.common.files import file_sha256
from dkto.common.processes import sole_writer
from dkto.common.progress import progress
from dkto.common.tensors import check_tensors, weight_files, weights_fingerprint, write_tensors
from dkto.training.step import Run

FOLDER = "noise_bank"  # in the prepared folder
AT_ONCE = 8  # images of a pass, whatever the batch of a run: kernels round by it, and runs share the file
ROWS_PER_FILE = 256
PATIENCE = 24 * 3600.0  # seconds to wait for another run that is filling the same bank


def bank_folder(run: Run) -> Path:
    """Where the predictions of a run lie: by all that they depend on."""
    config, data, model = run.config, run.batches.data, run.model
    names = ("seed", "noise_bank", "timestep_sampling", "prompt_dropout", "random_flip", "precision")
    about = {name: getattr(config, name) for name in names}
    about |= {"csft": config.csft_style if "csft_style" in run.method.settings else None}
    about |= {"device": run.engine.device.type, "index": file_sha256(data.folder / "index.parquet")}
    about |= {"denoiser": weights_fingerprint(weight_files(model.folder / model.denoiser_part))}
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    return data.folder / FOLDER / key


def fill_bank(run: Run) -> Callable[[np.ndarray, np.ndarray], Tensor]:
    """Compute what is missing of a run's bank; returns predictions (B, C, h, w) by rows (B,) and numbers (B,).

    Another run that fills the same bank is waited for; one that was killed left whole files or none.

    Raises:
        ValueError: if a file of the bank is damaged.
        OSError: if one cannot be written.
    """
    folder, count = bank_folder(run), len(run.batches.data)
    parts = [range(start, min(start + ROWS_PER_FILE, count)) for start in range(0, count, ROWS_PER_FILE)]
    paths = [folder / f"predictions-{number:05d}.safetensors" for number in range(len(parts))]
    with sole_writer(folder, patience=PATIENCE):
        missing = [(path, rows) for path, rows in zip(paths, parts, strict=True) if not path.exists()]
        with progress(total=sum(len(rows) for _, rows in missing), desc="noise bank", unit="image") as bar:
            for path, rows in missing:
                predictions = torch.stack([found for row in rows for found in _of_row(run, row, bar)])
                write_tensors(path, {"predictions": predictions})
    for path in paths:
        try:
            check_tensors(path, "noise bank", dtype="F32")
        except ValueError as error:
            raise ValueError(f"{error}: remove that file, and it is computed again") from error
    files, draws = [safe_open(path, framework="pt") for path in paths], run.config.noise_bank

    def read(rows: np.ndarray, numbers: np.ndarray) -> Tensor:
        places = [divmod(int(row), ROWS_PER_FILE) for row in rows]
        at = zip(places, numbers, strict=True)
        return torch.stack([files[f].get_slice("predictions")[r * draws + int(n)] for (f, r), n in at])

    return read


def _of_row(run: Run, row: int, bar) -> list[Tensor]:
    """The reference's predictions on each draw of an image."""
    numbers, found = np.arange(run.config.noise_bank), []
    for some in np.split(numbers, range(AT_ONCE, len(numbers), AT_ONCE)):
        batch = run.batches.draw_numbers(np.full(len(some), row), some).to(run.engine.device)
        with run.engine.pair.as_reference() as reference, run.engine.autocast():
            predicted = run.model.predict(reference, batch.noisy_latents, batch.timesteps, batch.conditioning)
        found.extend(predicted.float().cpu())
    bar.update()
    return found
