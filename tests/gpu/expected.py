"""What the GPU check measures, and what was expected of each figure before any run."""

from typing import NamedTuple


class Expected(NamedTuple):
    """One row of the table."""

    what: str
    least: float | None = None
    most: float | None = None

    @property
    def wanted(self) -> str:
        """The bounds in words."""
        bounds = {"at least": self.least, "at most": self.most}
        return " and ".join(f"{name} {bound:g}" for name, bound in bounds.items() if bound is not None)

    def verdict(self, value: float) -> str:
        """Whether a figure keeps them."""
        if not self.wanted:
            return "measured"
        low, high = self.least is None or value >= self.least, self.most is None or value <= self.most
        return "held" if low and high else "missed"


MEMORY_GB = {  # bf16, gradient checkpointing, batch 8: the table of tests/benchmarks/README.md, by size and rank
    ("sd15", 0): 15.4,
    ("sd15", 32): 3.5,
    ("sdxl", 0): 45.6,
    ("sdxl", 32): 9.4,
}
SCORERS = ("pickscore", "hps_v2_1", "image_reward", "laion_aesthetics", "clip_l14")
PEAK_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "B200": 2250}
"""Dense bf16 by a part of the card's name, as its maker states it; of another card a measured matrix product."""


def _of_size(size: str, title: str, share: float | None) -> dict[str, Expected]:
    return {
        f"{size}/batch": Expected(f"{title}: samples a step, all weights, bf16; halved until it fits"),
        f"{size}/samples_per_second": Expected(f"{title}: samples per second of our step"),
        f"{size}/step_over_bare": Expected(f"{title}: our step over its bare computation", most=1.05),
        f"{size}/share_of_peak": Expected(f"{title}: share of the card's bf16 peak, our step", least=share),
        f"{size}/share_of_matmul": Expected(f"{title}: the same over a large matrix product on this card"),
        f"{size}/peak_gb": Expected(f"{title}: peak memory of our step, GB"),
        f"{size}/bare_peak_gb": Expected(f"{title}: peak memory of the bare computation, GB"),
        f"{size}/idle": Expected(f"{title}: share of our step in which the GPU computes nothing", most=0.05),
        f"{size}/draw_over_step": Expected(f"{title}: drawing and moving a batch over a step, were it not overlapped"),
        f"{size}/fused": Expected(f"{title}: AdamW's step unfused over fused", least=1.0),
        f"{size}/channels_last": Expected(f"{title}: samples per second, channels_last over plain", least=1.0),
        f"{size}/compile": Expected(f"{title}: samples per second, compiled blocks over plain", least=1.1),
        f"{size}/compile_seconds": Expected(f"{title}: seconds of the first step with compiled blocks"),
        f"{size}/compile_first_reward": Expected(f"{title}: first |reward| of compiled blocks at beta 5000", most=0.01),
        f"{size}/over_published": Expected(
            f"{title}: samples per second over the published loop, both in bf16, images read beside it", least=2.0
        ),
        f"{size}/published_peak_gb": Expected(f"{title}: peak memory of the published loop, GB"),
    }


def _of_memory(size: str, rank: int) -> dict[str, Expected]:
    what = f"{size}, {f'LoRA of rank {rank}' if rank else 'all weights'}, batch 8, GB"
    beyond = Expected(f"{what}: what the card holds beyond that peak (dkto memory leaves 1.5)", most=1.5)
    peak = Expected(f"{what}: peak over that of dkto memory", 0.9, 1.1)
    return {f"memory/{size}-{rank}": peak, f"memory/{size}-{rank}-beyond_gb": beyond}


EXPECTED = {
    "tests/failed": Expected("tests marked gpu that failed", most=0),
    "tests/passed": Expected("tests marked gpu that passed"),
    "card/matmul_tflops": Expected("bf16 matrix product, 8192 x 8192, TFLOP/s"),
    **_of_size("sd15", "SD 1.5", 0.45),
    **_of_size("sdxl", "SDXL", None),
    "resume/difference": Expected("largest difference of weights, resumed from a checkpoint or not, bf16", most=0.0),
    "resume/repeat": Expected("the same between two whole runs"),
    **{key: row for size, rank in MEMORY_GB for key, row in _of_memory(size, rank).items()},
    "generate/images_per_second": Expected("dkto generate, SD 1.5 at 512 px, 20 steps, bf16: images per second"),
    **{f"scorers/{name}": Expected(f"{name}: images per second, float32") for name in SCORERS},
}
