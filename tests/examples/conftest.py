import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import clean_environment, free_port

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def play(tmp_path):
    """Run an example in an empty folder, as a person would; returns how it ended, with what it printed."""

    def run(name, *words, **variables):
        environment = clean_environment() | {"HF_HUB_OFFLINE": "1"} | variables
        command = [sys.executable, EXAMPLES / name, *map(str, words)]
        return subprocess.run(
            command, check=False, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240
        )

    return run


@pytest.fixture
def nobody():
    """A URL that nobody answers at."""
    return f"http://127.0.0.1:{free_port()}"


@pytest.fixture(scope="session")
def local_flux2(tiny):
    """A FLUX.2 with random weights, its text encoder on this machine, as diffusers puts it together."""
    import torch
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel
    from transformers import AutoTokenizer, Mistral3ForConditionalGeneration

    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=96,  # 3 layers of the checkpoint's 32
            axes_dims_rope=(4, 4, 4, 4),
        )
        vae = AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=2,
            sample_size=32,
        )
    listen_to_prompts(transformer)
    pipeline = Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=Mistral3ForConditionalGeneration.from_pretrained(tiny / "text_encoder", dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(tiny / "tokenizer"),
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def listen_to_prompts(transformer):
    """Grow weights through which the text reaches the picture: as they are drawn, a prompt moves it by 1 of 255."""
    import torch

    grown = {"norm_added_k": 4, "add_v_proj": 20}
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            weight.mul_(next((factor for part, factor in grown.items() if part in name), 2))


@pytest.fixture(scope="session")
def flux2_folder(local_flux2, tmp_path_factory):
    """The same in a folder whose index names a text encoder and a tokenizer that are not there."""
    import shutil

    folder = tmp_path_factory.mktemp("models") / "flux2"
    local_flux2.save_pretrained(folder)
    for name in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / name)
    return folder
