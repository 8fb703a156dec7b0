"""What a run trains with: processes, precision, policy and reference, optimiser, weight average."""

from dkto.common import quiet  # noqa: F401  (before diffusers, which speaks while it is imported)

# isort: split
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from dkto.common.files import read_json, write_json
from dkto.common.machine import peak_memory_mb
from dkto.common.names import shown
from dkto.common.tensors import check_tensors, read_tensors, write_tensors
from dkto.models import DiffusionModel, make_policy
from dkto.models.base import WEIGHTS_FILE
from dkto.models.policy import LORA_FILE
from dkto.training.config import RunConfig

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel  # it brings the pipelines, which take seconds

TRAINED = "F32"  # the type of what is trained, whatever the precision of the passes
WHOLE_STATE = "engine"  # what DeepSpeed writes for itself


class Engine:
    """The parts of one run, on this process' device and among its other processes.

    Precision is applied here, to policy and reference alike: trained weights stay in float32, passes run under
    autocast, frozen matrices are kept in the precision of the passes. accelerate's own mixed precision
    would reach the policy alone and has to stay off.

    Raises:
        ValueError: if a package or device that the configuration asks for is not there, or accelerate is set to
            apply mixed precision itself.
    """

    def __init__(self, config: RunConfig, model: DiffusionModel) -> None:
        self.config = config
        check_packages(config)
        # without an accelerator, cpu=True makes gloo ranks under torchrun
        on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
        tracker = None if config.tracker == "none" else config.tracker
        self.accelerator = Accelerator(cpu=on_cpu, log_with=tracker, project_dir=config.output_dir)
        if self.accelerator.mixed_precision != "no":
            raise ValueError(
                f"accelerate's own mixed precision is {self.accelerator.mixed_precision!r} and would reach the policy "
                "but not the reference: leave it 'no' there and give precision to the training"
            )
        self.device = self.accelerator.device
        config.samples_per_rank(self.accelerator.num_processes)
        self.dtype: torch.dtype = getattr(torch, config.precision)
        self.pair = make_policy(model.load_denoiser(), config.lora_rank, config.seed, frozen_dtype=self.dtype)
        if config.gradient_checkpointing:
            self.pair.policy.enable_gradient_checkpointing()
        self.pair.to(self.device)
        self.optimizer = make_optimizer(config, list(self.pair.trainable().values()))
        self.scaler = torch.amp.GradScaler(self.device.type) if config.precision == "float16" else None
        self.policy: nn.Module = self.pair.policy
        self.ema: EMAModel | None = None
        if self.sharded and config.ema_decay:
            raise ValueError("ema_decay needs whole weights on every process, which FSDP does not keep: set it to 0")
        if self.deepspeed:
            self._tell_deepspeed()

    def _tell_deepspeed(self) -> None:
        if self.config.gradient_accumulation > 1:
            raise ValueError(
                "DeepSpeed steps after every backward pass: set gradient_accumulation to 1, got "
                f"{self.config.gradient_accumulation}"
            )
        settings = self.accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = self.config.samples_per_rank(self.accelerator.num_processes)
        settings["gradient_clipping"] = self.config.max_grad_norm

    @property
    def rank(self) -> tuple[int, int]:
        """Number of this process, and how many there are."""
        return self.accelerator.process_index, self.accelerator.num_processes

    def start(self) -> None:
        """Hand policy and optimiser to accelerate; weights that are to be resumed are in place by now."""
        self.policy, self.prepared_optimizer = self.accelerator.prepare(self.pair.policy, self.optimizer)
        self.pair = replace(self.pair, policy=self.accelerator.unwrap_model(self.policy))
        if self.config.ema_decay and self.ema is None:
            from diffusers.training_utils import EMAModel

            self.ema = EMAModel(self.parameters, decay=self.config.ema_decay, foreach=True)  # begins at these weights
        if self.config.compile:
            self.compile_blocks()

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile the repeated blocks of policy and reference: other kernels round otherwise, so both need the same."""
        for network in filter(None, (self.pair.policy, self.pair.reference)):
            network.compile_repeated_blocks(backend=backend)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return list(self.pair.trainable().values())

    @property
    def sharded(self) -> bool:
        """Whether weights lie in pieces on several processes (FSDP)."""
        return self.accelerator.distributed_type == DistributedType.FSDP

    @property
    def deepspeed(self) -> bool:
        """Whether DeepSpeed keeps the optimiser."""
        return self.accelerator.distributed_type == DistributedType.DEEPSPEED

    def autocast(self) -> AbstractContextManager:
        """A context for one pass of a denoiser, in the precision of the run."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def no_sync(self, last: bool) -> AbstractContextManager:
        """Gradients are added up over processes in the last micro-batch only."""
        return nullcontext() if last else self.accelerator.no_sync(self.policy)

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over all processes."""
        return self.accelerator.reduce(values, "sum")

    @contextmanager
    def tracking(self) -> Iterator[None]:
        """A tracker that is open for the length of a `with` block, if the configuration asks for one."""
        if self.config.tracker == "none":
            yield
            return
        self.accelerator.init_trackers("dkto", self.config.to_dict())
        try:
            yield
        finally:
            self.accelerator.end_training()

    def track(self, record: dict) -> None:
        """Send a step's record to the tracker, if there is one."""
        self.accelerator.log(record, step=record["global_step"])

    def gather(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Columns of the whole global batch on the CPU, from each micro-batch's share of this process, (B,) each."""
        table = torch.cat([torch.stack(list(part.values())) for part in parts], 1)
        return dict(zip(parts[0], self.accelerator.gather(table.T.contiguous()).T.cpu(), strict=True))

    def any(self, asked: bool) -> bool:
        """Whether any process asks: all of them must leave after the same step."""
        return asked if self.rank[1] == 1 else bool(self.sum(torch.tensor(float(asked), device=self.device)) > 0)

    def backward(self, loss: Tensor) -> None:
        """Gradients of one micro-batch."""
        self.accelerator.backward(loss if self.scaler is None else self.scaler.scale(loss))

    def clip(self) -> float:
        """Scale gradients down to `max_grad_norm`; returns their norm before."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = self.accelerator.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm)
        return 0.0 if norm is None else float(norm)  # DeepSpeed knows it after its first step

    def set_rate(self, learning_rate: float) -> None:
        """Learning rate of the step to come, before its first backward pass: DeepSpeed steps within that."""
        for group in self.prepared_optimizer.param_groups:
            group["lr"] = learning_rate

    def step(self, finite: bool) -> bool:
        """Change the weights if loss and gradients are finite; says whether it did."""
        if self.scaler is not None:
            before = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            finite = finite and self.scaler.get_scale() >= before  # a step left out lowers the scale
        elif finite:
            self.prepared_optimizer.step()
        self.prepared_optimizer.zero_grad()
        if finite and self.ema is not None:
            self.ema.step(self.parameters)
        return finite

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The weight average in the policy's place, if there is one, for the length of a `with` block."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    def full_weights(self) -> dict[str, Tensor] | None:
        """All weights of the policy where they are sharded over processes (every rank has to ask), else None."""
        return self.accelerator.get_state_dict(self.policy) if self.sharded else None

    def moments(self) -> dict[str, Tensor]:
        """The optimiser's state by parameter, whole on the main process; every rank calls."""
        if self.deepspeed or not (self.accelerator.is_main_process or self.sharded):
            return {}
        if self.sharded:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            state = get_optimizer_state_dict(self.policy, self.optimizer, options=options).get("state", {})  # rank 0's
        else:
            state = {name: self.optimizer.state[parameter] for name, parameter in self.pair.trainable().items()}
        return {
            f"{name}/{key}": torch.as_tensor(value).contiguous().clone()
            for name, values in state.items()
            for key, value in values.items()
        }

    def write_state(self, folder: Path, moments: dict[str, Tensor]) -> None:
        """Write what a resumed training needs beside weights: moments, weight average, loss scale."""
        about: dict[str, object] = {}
        write_tensors(folder / "optimizer.safetensors", moments)
        if self.ema is not None:
            names = self.pair.trainable()
            write_tensors(folder / "ema.safetensors", dict(zip(names, self.ema.shadow_params, strict=True)))
            about["ema_step"] = self.ema.optimization_step
        if self.scaler is not None:
            about["scaler"] = self.scaler.state_dict()
        write_json(folder / "engine.json", about)

    def save_whole_state(self, folder: Path) -> None:
        """Let DeepSpeed write its own state, if it is there; every rank calls."""
        if self.deepspeed:
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(folder / WHOLE_STATE)
        self.accelerator.wait_for_everyone()

    def check_checkpoint(self, folder: Path) -> None:
        """Refuse a checkpoint that cannot be gone on from; the engine has not been started.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if one is damaged, of other shapes, or holds what is not finite.
        """
        wanted = {"scaler": self.scaler is not None, "ema_step": bool(self.config.ema_decay)}
        read_json(folder / "engine.json", "state of an engine", [key for key, there in wanted.items() if there])
        trained = {name: list(parameter.shape) for name, parameter in self.pair.trainable().items()}
        if self.pair.reference is None:
            weights = {f"{self.pair.part}.{name.replace('.default.', '.')}": shape for name, shape in trained.items()}
            check_tensors(folder / LORA_FILE, "weights", weights, TRAINED)
        else:
            weights = {name: list(value.shape) for name, value in self.pair.policy.state_dict().items()}
            check_tensors(folder / self.pair.part / WEIGHTS_FILE, "weights", weights, TRAINED)
        if self.config.ema_decay:
            check_tensors(folder / "ema.safetensors", "average of weights", trained, TRAINED)
        if self.deepspeed:
            return
        path = folder / "optimizer.safetensors"
        plain = TRAINED if self.config.optimizer == "adamw" else None  # its moments; others are of several types
        for name, shape in check_tensors(path, "optimizer state", dtype=plain).items():
            parameter, _, key = name.rpartition("/")
            if parameter not in trained or (key.startswith("exp_avg") and shape != trained[parameter]):
                raise ValueError(f"{path} holds no optimizer state: {shown(name)} of shape {shape} is of other weights")

    def load_state(self, folder: Path) -> None:
        """Go on from what `write_state` wrote; the engine has been started."""
        about = read_json(folder / "engine.json", "state of an engine")
        if self.scaler is not None:
            self.scaler.load_state_dict(about["scaler"])
        if self.deepspeed:
            self.accelerator.load_state(folder / WHOLE_STATE)
        else:
            _restore_moments(self, read_tensors(folder / "optimizer.safetensors", "optimizer state"))
        if self.ema is not None:
            stored = read_tensors(folder / "ema.safetensors", "average of weights")
            self.ema.shadow_params = [stored[n].to(p.device) for n, p in self.pair.trainable().items()]
            self.ema.optimization_step = about["ema_step"]

    def peak_memory_mb(self) -> float:
        """Most memory that was ever held at once: of the GPU, or on a CPU of the process; MB of 2^20 bytes."""
        return torch.cuda.max_memory_allocated() / 2**20 if self.device.type == "cuda" else peak_memory_mb()


def check_packages(config: RunConfig) -> None:
    """Refuse what the machine lacks before anything is loaded."""
    wanted = {"optimizer 'adamw8bit'": "bitsandbytes"} if config.optimizer == "adamw8bit" else {}
    if config.tracker != "none":
        wanted[f"tracker {config.tracker!r}"] = config.tracker
    for what, package in wanted.items():
        if find_spec(package) is None:
            raise ValueError(f"{what} needs the package {package}, which is not installed: pip install {package}")
    if config.compile and not torch.cuda.is_available():
        raise ValueError(
            "compile needs a GPU and there is none here: on a CPU the compiled policy's gradients were measured to "
            "differ from the plain ones; train with compile off"
        )


def make_optimizer(config: RunConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW in float32, in one pass over memory where the device has a kernel for it, or with moments of 8 bits."""
    options = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, **options)
    return torch.optim.AdamW(parameters, **options, fused=parameters[0].device.type in ("cpu", "cuda"))


def _restore_moments(engine: Engine, stored: dict[str, Tensor]) -> None:
    state: dict[str, dict[str, Tensor]] = {}
    for path, value in stored.items():
        name, _, key = path.rpartition("/")
        state.setdefault(name, {})[key] = value
    if engine.sharded:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        groups = engine.optimizer.state_dict()["param_groups"]
        whole = {"state": state, "param_groups": groups}
        set_optimizer_state_dict(engine.policy, engine.optimizer, whole, options=options)
        return
    fused = engine.optimizer.defaults.get("fused")  # such a kernel counts its steps beside the weights, others on a CPU
    for name, parameter in engine.pair.trainable().items():
        moments = {k: v.to(parameter.device) if fused or v.ndim else v for k, v in state.get(name, {}).items()}
        if moments:
            engine.optimizer.state[parameter] = moments
