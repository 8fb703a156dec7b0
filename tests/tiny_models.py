"""Real pipelines of a few thousand random weights: 16 px images, 8x8 latents, built from configurations."""

import torch

VAE = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "norm_num_groups": 2,
    "sample_size": 16,
}


def clip_encoder(tokenizer, with_projection, width=16):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config)


def tiny_vae(**more):
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(3)
        vae = AutoencoderKL(**VAE, **more)
    with torch.no_grad():  # as trained ones: latents that differ from picture to picture more than within a posterior
        vae.quant_conv.weight[:4] *= 10
        vae.quant_conv.bias[4:] -= 8
    return vae


def make_tiny_sd(folder):
    """A Stable Diffusion pipeline, as version 1.5 has it."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from dkto.workshop.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(folder / "made")
    torch.manual_seed(0)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=24,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    vae = AutoencoderKL(**VAE)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def make_tiny_sdxl(folder):
    """A Stable Diffusion XL pipeline: two text encoders, pooled embedding, time ids."""
    from diffusers import (
        EulerDiscreteScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )

    from dkto.workshop.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(folder / "made")
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    StableDiffusionXLPipeline(
        vae=tiny_vae(scaling_factor=0.7),
        text_encoder=clip_encoder(tokenizer, with_projection=False),
        text_encoder_2=clip_encoder(tokenizer, with_projection=True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
    ).save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def t5_encoder():
    """Tokenizer and encoder that know ten words."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    words = ["a", "red", "circle", "blue", "square", "picture", "good", "bad", "image", "the"]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    tokenizer = T5Tokenizer(vocab=[*special, *(("▁" + word, -3.0) for word in words)], extra_ids=0)
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return tokenizer, T5EncoderModel(config)


def make_tiny_sd3(folder, with_t5=True):
    """A Stable Diffusion 3 pipeline, with its third text encoder or, as many people run it, without."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    from dkto.workshop.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(folder / "made")
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    tokenizer_3, text_encoder_3 = t5_encoder() if with_t5 else (None, None)
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(scaling_factor=0.5, shift_factor=0.0609),
        text_encoder=clip_encoder(tokenizer, with_projection=True),
        tokenizer=tokenizer,
        text_encoder_2=clip_encoder(tokenizer, with_projection=True),
        tokenizer_2=tokenizer,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    ).save_pretrained(folder / "pipeline")
    return folder / "pipeline"


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
QWEN = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}


def qwen_tokenizer():
    """One token for each byte, Qwen's special ones, and the words of its template."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    vocab = {"<|endoftext|>": 0} | {letter: i + 1 for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], chat_template=TEMPLATE, model_max_length=131072)
    words = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "user", "assistant", "\n\n"]
    tokenizer.add_tokens(words, special_tokens=True)
    return tokenizer


def qwen3_encoder(tokenizer, kind, layers):
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer), num_hidden_layers=layers, head_dim=8, tie_word_embeddings=True, **QWEN
    )
    return getattr(transformers, kind)(config)


def write_flow(pipeline, folder):
    """Save a pipeline whose transformer says that images are small."""
    import json

    pipeline.save_pretrained(folder / "pipeline")
    place = folder / "pipeline" / "transformer" / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"sample_size": 8}))
    return folder / "pipeline"


def make_tiny_qwen_image(folder):
    """A Qwen-Image pipeline: Qwen2.5-VL, a VAE of videos, latents of their own scale in each channel."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    text = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, **QWEN}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e6}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 16}
    vision["fullatt_block_indexes"] = [0]
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.0, 0.3],
        latents_std=[0.5, 1.0, 2.0, 0.8],
    )
    with torch.no_grad():
        vae.quant_conv.weight[:4] *= 10
        vae.quant_conv.bias[4:] -= 8
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02, max_shift=0.9),
        vae=vae,
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        tokenizer=tokenizer,
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 2, 2),
        ),
    )
    return write_flow(pipeline, folder)


def make_tiny_z_image(folder):
    """A Z-Image pipeline: Qwen3, and an AutoencoderKL that scales and shifts."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=tiny_vae(scaling_factor=0.5, shift_factor=0.0609),
        text_encoder=qwen3_encoder(tokenizer, "Qwen3Model", 2),
        tokenizer=tokenizer,
        transformer=ZImageTransformer2DModel(
            in_channels=4,
            dim=16,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 2, 2],
            axes_lens=[1024, 16, 16],
        ),
    )
    return write_flow(pipeline, folder)


def make_tiny_klein(folder):
    """A FLUX.2 klein pipeline: Qwen3, a VAE whose latents are normalised in patches, blocks of two streams and one."""
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )

    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    vae = AutoencoderKLFlux2(**VAE)
    with torch.no_grad():
        vae.quant_conv.weight[:4] *= 10
        vae.quant_conv.bias[4:] -= 8
        vae.bn.running_mean.uniform_(-0.3, 0.3)
        vae.bn.running_var.uniform_(0.3, 2.0)
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=qwen3_encoder(tokenizer, "Qwen3ForCausalLM", 28),
        tokenizer=tokenizer,
        transformer=Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=48,
            axes_dims_rope=(2, 2, 2, 2),
            guidance_embeds=False,
        ),
    )
    return write_flow(pipeline, folder)
