"""Latent spaces are diffusers' VAEs: their numbers, their pipelines' images, and no code of theirs."""

import json

import numpy as np
import pytest
import torch as th
from tiny import make_vae

from guided_diffusion.errors import UserError
from guided_diffusion.io.diffusers_library import import_diffusers
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.spaces import LatentSpace, PixelSpace

diffusers = import_diffusers("the test")
FACTORS = {"scaling_factor": 0.5, "shift_factor": 0.25}


@pytest.fixture
def images():
    return th.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8))


def rewrite(folder, **changes):
    """Change a folder's config.json; None removes a key."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_an_autoencoders_latents_are_shifted_and_scaled(tmp_path, images):
    vae = make_vae(tmp_path, channels=4, **FACTORS)
    space = LatentSpace(tmp_path, 8)
    assert (space.shape, space.image_size) == ((4, 8, 8), 16)
    posterior = vae.encode(PixelSpace(16).encode(images)).latent_dist
    mean, std = space.moments(images).chunk(2, dim=1)
    th.testing.assert_close(mean, (posterior.mean - 0.25) * 0.5)
    th.testing.assert_close(std, posterior.std * 0.5)
    th.manual_seed(1)
    x = space.encode(images)
    th.manual_seed(1)
    th.testing.assert_close(x, (posterior.sample() - 0.25) * 0.5)
    th.testing.assert_close(space.pixels(x), vae.decode(x / 0.5 + 0.25).sample)
    nearest = ((space.pixels(x).clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy().round()
    assert np.abs(space.decode(x) - nearest).max() <= 1 and (space.decode(x) == nearest).mean() > 0.99


def test_a_vq_models_latents_are_not_yet_quantised(tmp_path, images):
    vae = make_vae(tmp_path, "VQModel", scaling_factor=0.5)
    space = LatentSpace(tmp_path, 8)
    x = space.encode(images)
    th.testing.assert_close(x, vae.encode(PixelSpace(16).encode(images)).latents * 0.5)
    th.testing.assert_close(space.pixels(x), vae.decode(x / 0.5).sample)
    assert not th.allclose(space.pixels(x), vae.decode(x / 0.5, force_not_quantize=True).sample)


def test_codes_of_another_width_than_the_latents(tmp_path):
    make_vae(tmp_path, "VQModel", vq_embed_dim=5)
    assert LatentSpace(tmp_path, 8).shape == (5, 8, 8)
    assert LatentSpace(tmp_path, 8).decode(th.zeros(2, 5, 8, 8)).shape == (2, 16, 16, 3)


def ldm(folder, vae):
    """An LDMPipeline as CompVis published it, with a VAE and a small random U-Net."""
    th.manual_seed(3)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195, clip_sample=False
    )
    pipeline = diffusers.LDMPipeline(vqvae=vae, unet=unet, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ours(pipeline, space, steps=5):
    """The images in [0, 1] of our chain and our decoding, from the pipeline's noise."""
    process = create_gaussian_diffusion(
        noise_schedule="scaled_linear",
        beta_start=0.0015,
        beta_end=0.0195,
        clip_denoised=False,
        timestep_respacing=f"ddim{steps}",
    )
    noise = th.randn(2, 3, 8, 8, generator=th.Generator().manual_seed(7))
    x = process.ddim_sample_loop(
        lambda x, t: pipeline.unet(x, t).sample, noise.shape, noise=noise, clip_denoised=False
    )
    return (space.pixels(x) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def theirs(pipeline, steps=5):
    generator = th.Generator().manual_seed(7)
    return pipeline(batch_size=2, generator=generator, num_inference_steps=steps, output_type="np").images


@pytest.mark.parametrize("factor", [1.0, 0.18215])
def test_chain_and_decoding_are_those_of_diffusers_own_pipeline(tmp_path, factor):
    pipeline = ldm(tmp_path, make_vae(tmp_path, "VQModel", scaling_factor=factor))
    np.testing.assert_allclose(ours(pipeline, LatentSpace(tmp_path, 8)), theirs(pipeline), atol=1e-4)


def test_a_vq_model_whose_file_gives_no_factor_is_ldms_at_scale_1(tmp_path):
    """As CompVis/ldm-celebahq-256, for which diffusers takes Stable Diffusion's (its issue 6725)."""
    pipeline = ldm(tmp_path, make_vae(tmp_path, "VQModel"))
    wrong = theirs(pipeline)
    rewrite(tmp_path, scaling_factor=None)
    assert LatentSpace(tmp_path, 8).scale == 1
    images = ours(pipeline, LatentSpace(tmp_path, 8))
    assert np.abs(images - wrong).max() > 0.01
    pipeline.vqvae.register_to_config(scaling_factor=1.0)
    np.testing.assert_allclose(images, theirs(pipeline), atol=1e-4)


def test_a_file_that_wrongly_gives_a_factor_is_warned_of_and_can_be_corrected(tmp_path, capsys):
    make_vae(tmp_path, "VQModel")
    for given, scale, warned in ((0.0, 0.18215, True), (0.18215, 0.18215, False), (1.0, 1, False)):
        space = LatentSpace(tmp_path, 8, given)
        space.decode(th.zeros(1, 3, 8, 8))
        assert space.scale == scale  # without ours the one that diffusers saved
        assert ("have vae_scale=1" in capsys.readouterr().err) == warned


def test_an_autoencoder_whose_file_gives_no_factor_has_its_classes(tmp_path):
    make_vae(tmp_path)
    rewrite(tmp_path, scaling_factor=None)
    assert (
        LatentSpace(tmp_path, 8).scale
        == diffusers.AutoencoderKL.from_pretrained(tmp_path).config.scaling_factor
    )


def test_decoding_goes_by_pieces(tmp_path, monkeypatch):
    make_vae(tmp_path)
    x = th.randn(5, 3, 8, 8)
    whole = LatentSpace(tmp_path, 8).pixels(x)
    monkeypatch.setattr("guided_diffusion.spaces.latent._PIXELS_AT_ONCE", 2 * 16**2)
    space, rows = LatentSpace(tmp_path, 8), []
    vae = space.vae(x.device)
    vae.decoder.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    th.testing.assert_close(space.pixels(x), whole)
    assert rows == [2, 2, 1]


def test_older_names_and_half_precision(tmp_path):
    """As the files of stable-diffusion v1 and CompVis/ldm-celebahq-256 have them."""
    from safetensors.torch import load_file, save_file

    vae = make_vae(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, value in load_file(path).items():
        for new, older in old.items():
            name = name.replace(f"attentions.0.{new}", f"attentions.0.{older}")
        state[name] = value.half()
    assert any("query" in name for name in state)
    save_file(state, path)
    x = th.randn(1, 3, 8, 8)
    space = LatentSpace(tmp_path, 8, 1.0)
    assert space.pixels(x).dtype == th.float32
    th.testing.assert_close(space.pixels(x), vae.decode(x).sample, atol=5e-3, rtol=0)


def test_the_weights_are_part_of_the_identity(tmp_path):
    make_vae(tmp_path / "a", seed=0)
    make_vae(tmp_path / "b", seed=1)
    a, b = (LatentSpace(tmp_path / name, 8).identity() for name in "ab")
    assert a["vae_sha256"] != b["vae_sha256"] and a["vae_scale"] == b["vae_scale"] == 0.18215
    make_vae(tmp_path / "a", seed=1)
    assert LatentSpace(tmp_path / "a", 8).identity() == b
    assert LatentSpace(tmp_path / "a", 8, 2.0).identity() != b


# --- folders that are none -------------------------------------------------------------------------


def pickled(folder):
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")


def truncated(folder):
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "harm, told",
    [
        (pickled, "has pickled weights alone (diffusion_pytorch_model.bin)"),
        (truncated, "not a readable VAE"),
        (lambda f: rewrite(f, _class_name="AutoencoderTiny"), "of class 'AutoencoderTiny'; a VAE is one of"),
        (lambda f: rewrite(f, _class_name=["VQModel"]), "of class"),
        (lambda f: rewrite(f, block_out_channels=[2**20, 2**20]), "do not fit config.json"),
        (
            lambda f: rewrite(f, block_out_channels=[2**40, 8]),
            "block_out_channels [1099511627776, 8] is beyond",
        ),
        (lambda f: rewrite(f, block_out_channels=8), "block_out_channels must be a list"),
        (lambda f: rewrite(f, block_out_channels=[]), "block_out_channels must be a list"),
        (lambda f: rewrite(f, layers_per_block=10**6), "layers_per_block 1000000 is beyond reason"),
        (lambda f: rewrite(f, layers_per_block=2), "do not fit config.json"),
        (lambda f: rewrite(f, norm_num_groups=0), "do not fit config.json, or it is damaged"),
        (lambda f: rewrite(f, act_fn="eval"), "do not fit config.json, or it is damaged"),
        (lambda f: rewrite(f, latent_channels="3"), "latent_channels and vq_embed_dim must be whole numbers"),
        (lambda f: rewrite(f, scaling_factor="1"), "scaling_factor and shift_factor must be numbers"),
        (lambda f: rewrite(f, in_channels=1), "in_channels is 1, images have 3 channels"),
        (lambda f: rewrite(f, latents_mean=[0.0]), "latents_mean is not known here"),
        (lambda f: rewrite(f, quantization_config={"load": "x"}), "quantization_config is not known here"),
        (lambda f: (f / "config.json").write_text("{"), "not a readable configuration of a VAE"),
        (lambda f: (f / "config.json").write_text("[]"), "not a readable configuration of a VAE"),
        (lambda f: (f / "config.json").unlink(), "not a readable configuration of a VAE"),
    ],
)
def test_what_is_no_vae_is_refused_in_one_line(tmp_path, harm, told):
    make_vae(tmp_path)
    harm(tmp_path)
    with pytest.raises(UserError) as error:
        LatentSpace(tmp_path, 8).decode(th.zeros(1, 3, 8, 8))
    assert told in str(error.value) and "\n" not in str(error.value)


def test_a_missing_folder_is_told(tmp_path):
    with pytest.raises(UserError, match="vae_path: no such folder"):
        LatentSpace(tmp_path / "nowhere", 8)
