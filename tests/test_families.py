"The second family of models behind the same contract: what is above the backbone neither changes nor knows."

import numpy as np
import pytest
import torch
from PIL import Image

from collectionlora import flow
from collectionlora.bases.families import FAMILIES, families_with, family_of_folder, QWEN_21, QWEN_EDIT
from collectionlora.bases.pipeline import load_base
from collectionlora.bases.qwen21 import blank_pass, layout
from collectionlora.bases.slots import layer_sizes
from collectionlora.bases.tiny import tiny_base
from collectionlora.bases.tiny_qwen21 import tiny_qwen21
from collectionlora.core import UserError
from collectionlora.files.dialects import Lora

PROMPT = 'make the cat red'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tiny_qwen21(tmp_path_factory.mktemp('families') / 'second')


@pytest.fixture(scope='module')
def base(folder):
    return load_base(folder)


def photo(seed, size=(64, 64)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def steps_of(base, **asked):
    "What the stock pipeline gave its transformer in each step, and what it got."
    seen = []
    hook = base.pipe.transformer.register_forward_hook(lambda m, a, k, out: seen.append((k, out[0])), with_kwargs=True)
    images = base.pipe(**asked, output_type='np').images
    hook.remove()
    return seen, images


def random_lora(modules, rank, seed=0):
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(shape, generator=g) / 8
    return Lora({n: (r(rank, i), r(o, rank)) for n, (i, o) in modules.items()})


@pytest.mark.parametrize('sizes', [[(64, 64)], [(90, 40)], [(30, 100), (64, 64)]], ids=['square', 'wide', 'two'])
def test_the_velocity_is_that_of_the_stock_step(base, sizes):
    pictures = [photo(i, size) for i, size in enumerate(sizes)]
    cond = base.cond([pictures], [PROMPT])
    h, w = cond.grids[0]
    x = flow.noise_like((1, h * w, 16), [3])
    asked = dict(prompt=PROMPT, image=pictures, output_resolution=64, num_inference_steps=2, latents=x)
    seen, _ = steps_of(base, **asked, use_kv_cache=False)
    given, theirs = seen[0]
    with torch.no_grad():
        ours = base.backbone.velocity('base', x, given['timestep'], cond)
        blank = blank_pass(base.backbone, x, given['timestep'], cond)
    assert (ours - theirs[:, -h * w :]).abs().max() < 1e-5 < ours.abs().max()
    assert (ours - blank).abs().max() < 1e-5


def test_the_whole_picture_with_guidance_is_that_of_the_stock_pipeline(base):
    picture, n = photo(4, (50, 70)), 4
    cond, uncond = base.cond([picture], [PROMPT]), base.uncond([picture])
    grid = cond.grids[0]
    x = flow.noise_like((1, grid[0] * grid[1], 16), [5])
    v = lambda x, t: base.backbone.guided('base', x, t, cond, uncond, 3.0)
    with torch.no_grad():
        ours = base.decode(flow.sample_ode(v, x, base.times(n, grid)), grid, 'np')
    asked = dict(prompt=PROMPT, image=picture, negative_prompt=' ', true_cfg_scale=3.0, output_resolution=64)
    theirs = base.pipe(**asked, num_inference_steps=n, latents=x, output_type='np').images
    assert ours.shape[-1] == 3 and np.abs(ours - theirs[..., :3]).max() < 1e-5


def test_sampling_times_of_the_folder_go_through_its_scheduler(base):
    own = [1.0, 0.8, 0.3]
    base.pipe.register_to_config(sample_sigmas=own)
    try:
        base.pipe(PROMPT, photo(1), output_resolution=64, output_type='latent')
        assert np.allclose(base.times(3, (4, 4)), base.pipe.scheduler.sigmas.tolist(), atol=1e-6)
        assert base.times(2, (4, 4))[1] != pytest.approx(base.times(3, (4, 4))[1])
    finally:
        base.pipe.register_to_config(sample_sigmas=None)


def test_neither_padding_nor_the_batch_changes_a_row(base):
    prompts = [PROMPT, 'a much longer instruction about the whole background', 'a']
    cond = base.cond([photo(1)] * 3, prompts)
    x, t = flow.noise_like((3, 16, 16), [1, 2, 3]), torch.tensor([0.3, 0.8, 0.5])
    with torch.no_grad():
        together = base.backbone.velocity('base', x, t, cond)
        alone = [base.backbone.velocity('base', x[i : i + 1], t[i : i + 1], cond.index([i])) for i in range(3)]
        base.backbone.micro_batch = 1
        parts = base.backbone.velocity('base', x, t, cond)
        base.backbone.micro_batch = 0
    assert (together - torch.cat(alone)).abs().max() < 1e-6 and torch.equal(parts, torch.cat(alone))


def test_embeddings_are_the_stock_pipelines_less_the_places(base):
    picture, prompts = photo(2, (90, 40)), [PROMPT, 'a much longer instruction', '']
    emb, mask = base.encode_prompts([picture] * 3, prompts)
    seen = [base.pipe.image_processor.resize(picture.convert('RGBA'), *base.size(picture))]
    for i, prompt in enumerate(prompts):
        theirs, _, places = base.pipe.encode_prompt(prompt, image=seen)
        assert (emb[i][mask[i]] - theirs[0][~places[0]]).abs().max() < 1e-5


def test_roles_learn_merge_and_shrink_as_on_the_first_family(folder):
    b = load_base(folder).backbone
    b.add_role('student', 2, seed=1)
    cond, x, t = load_base(folder).cond([photo(1)], [PROMPT]), flow.noise_like((1, 16, 16), [1]), torch.tensor([0.5])
    b.load('student', random_lora(b.modules(), 2))
    grads = []
    for on in (False, True):
        b.checkpointing(on)
        loss = b.velocity('student', x, t, cond).square().mean()
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, b.parameters('student'))]))
    assert torch.equal(*grads) and (grads[0] != 0).float().mean() > 0.5
    with torch.no_grad():
        plain, bare = b.velocity('student', x, t, cond), b.velocity('base', x, t, cond)
        with b.merged('student'):
            merged = b.velocity('student', x, t, cond)
    assert (plain - merged).abs().max() < 1e-5 < (plain - bare).abs().max()
    frozen = load_base(folder, frozen='int8').backbone
    with torch.no_grad():
        assert 0 < (frozen.velocity('base', x, t, cond) - bare).abs().max() < 0.1


def test_layers_are_known_from_the_configuration(base, folder, tmp_path):
    config = base.pipe.transformer.config
    assert (
        list(QWEN_21.layers(config).items())
        == list(base.backbone.modules().items())
        == list(layer_sizes(folder).items())
    )
    first = tiny_base(tmp_path / 'first')
    assert list(QWEN_EDIT.layers(load_base(first).pipe.transformer.config).items()) == list(layer_sizes(first).items())
    assert families_with(layer_sizes(first)) == [QWEN_EDIT] and families_with(layer_sizes(folder)) == [QWEN_21]
    assert families_with(['transformer_blocks.0.attn.to_q']) == list(FAMILIES)
    assert family_of_folder(folder) is QWEN_21 and families_with(['blocks.0.attn']) == []


def test_too_many_pictures_and_too_few_words_are_refused(base):
    with pytest.raises(UserError, match='at most 10'):
        layout(base.backbone.cuts, 99, ((2, 2),) * 12)
    with pytest.raises(UserError, match='do not reach'):
        layout(base.backbone.cuts, 3, ((2, 2), (2, 2)))
