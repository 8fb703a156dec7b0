"""The schedule is diffusers' own, number by number."""

import warnings

import pytest
import torch

from toy.schedule import Schedule, linear_schedule


def test_equal_to_diffusers_ddpm_scheduler():
    """`add_noise` and `step` at every timestep; diffusers computes in float32, whose rounding is 6e-8 relative."""
    from diffusers import DDPMScheduler

    ours = linear_schedule(50)
    theirs = DDPMScheduler(
        num_train_timesteps=50,
        beta_start=2e-3,
        beta_end=0.2,
        beta_schedule="linear",
        variance_type="fixed_small",
        clip_sample=False,
    )
    assert torch.allclose(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=1e-5)
    sample, noise, output = torch.randn(3, 7, 2)
    timesteps = torch.tensor([0, 1, 10, 20, 30, 40, 49])
    assert torch.allclose(
        ours.add_noise(sample, noise, timesteps), theirs.add_noise(sample, noise, timesteps), atol=1e-5
    )
    for timestep in range(50):
        generator = torch.Generator().manual_seed(timestep)
        expected = theirs.step(output, timestep, sample, generator=generator).prev_sample
        drawn = torch.randn(sample.shape, generator=torch.Generator().manual_seed(timestep))
        assert torch.allclose(ours.step(output, timestep, sample, drawn), expected, atol=1e-5), timestep


def test_ddim_step_equals_diffusers():
    from diffusers import DDIMScheduler

    ours = linear_schedule(50)
    theirs = DDIMScheduler(
        num_train_timesteps=50, beta_start=2e-3, beta_end=0.2, beta_schedule="linear", clip_sample=False
    )
    theirs.set_timesteps(50)
    sample, output = torch.randn(2, 7, 2)
    for timestep in range(50):
        expected = theirs.step(output, timestep, sample).prev_sample
        assert torch.allclose(ours.ddim_step(output, timestep, sample), expected, atol=1e-5), timestep


@pytest.mark.parametrize("length", [20, 50, 100, 1000])
def test_the_default_ends_near_half_a_percent_without_a_warning(length):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 1e-3 < float(linear_schedule(length).alphas_cumprod[-1]) < 0.01


def test_a_schedule_that_ends_in_pure_noise_warns_with_the_reason():
    with pytest.warns(UserWarning, match=r"last alphas_cumprod is 2\.\de-05, below 0\.001: .*1/sqrt\(alphas_cumprod\)"):
        linear_schedule(50, last_beta=0.37)


def test_diffusers_cosine_schedule_warns_too():
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(num_train_timesteps=50, beta_schedule="squaredcos_cap_v2")
    with pytest.warns(UserWarning, match="preference objectives blow up"):
        Schedule(theirs.betas.double())


def test_add_noise_takes_leading_dimensions():
    schedule = linear_schedule(50)
    clean, noise, timesteps = torch.randn(3, 4, 2), torch.randn(3, 4, 2), torch.randint(50, (3, 4))
    all_at_once = schedule.add_noise(clean, noise, timesteps)
    assert torch.equal(all_at_once[1, 2], schedule.add_noise(clean[1, 2], noise[1, 2], timesteps[1, 2]))
    assert schedule.add_noise(clean.double(), noise.double(), timesteps).dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Schedule(torch.ones(2, 2)), r"betas must have shape \(T,\) with T >= 1, got \(2, 2\)"),
        (lambda: Schedule(torch.tensor([0.1, 1.0])), r"betas must be in \(0, 1\), got 0\.1 to 1"),
        (lambda: linear_schedule(0), "num_train_timesteps must be 1 or above, got 0"),
        (lambda: linear_schedule(50).ddim_coefficients(50), r"timestep must be in \[0, 50\), got 50"),
    ],
)
def test_wrong_arguments_raise_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
