"The second family of models behind the same contract: what is above the backbone neither changes nor knows."

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from conftest import NO_TORCHVISION
from collectionlora import flow
from collectionlora.bases.backbone import Cond
from collectionlora.bases.families import FAMILIES, families_with, family_of_folder, QWEN_21, QWEN_EDIT
from collectionlora.bases.pipeline import load_base, load_pipe
from collectionlora.bases.qwen21 import Backbone21, blank_pass, layout
from collectionlora.bases.slots import layer_sizes
from collectionlora.bases.tiny import tiny_base
from collectionlora.bases.tiny_qwen21 import tiny_qwen21
from collectionlora.core import UserError
from collectionlora.files.card import comfyui_workflow, inspect, model_card, write_card
from collectionlora.files.dialects import DIALECTS, Lora, unflatten
from collectionlora.files.effects import write_effect
from collectionlora.files.header import base_identity, read_header
from collectionlora.files.lora import convert, read_lora, write_lora
from collectionlora.run import chain
from collectionlora.run.cli import app
from collectionlora.use.edit import Collection
from collectionlora.use.plain import fixed_noise
from collectionlora.use.sampling import Recipe, sample

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


# --- files


@pytest.fixture(scope='module')
def file(base, folder, tmp_path_factory):
    "A collection file of this base with two effects."
    effects = [dict(id=i, category='object', trigger=f'{i}x', prompt=f'{i}x, make it {i}') for i in ('candy', 'lava')]
    sampling = dict(steps=3, shift=3.0, times=flow.ode_times(3, 3.0), cfg=1, stochastic=False)
    said = {'hash': base.hash, **base_identity(folder)}
    header = {'collectionlora.effects': effects, 'collectionlora.sampling': sampling, 'collectionlora.base': said}
    path = tmp_path_factory.mktemp('files') / 'mine.safetensors'
    write_lora(path, random_lora(base.backbone.modules(), 3), header)
    return path


@pytest.fixture(scope='module')
def plain(folder, file):
    "The stock pipeline with that file, by its own loader."
    pipe = load_pipe(folder, torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    return pipe


@pytest.mark.parametrize('shift', [3.0, None], ids=['of the file', 'of the folder'])
def test_the_stock_pipeline_with_its_scheduler_makes_our_edit(plain, folder, file, shift):
    picture, recipe = photo(6, (70, 50)), Recipe(3, shift, (), stochastic=False)
    with Collection.load(folder, file) as mine:
        prompt, noise, config = mine.prompt('candy'), fixed_noise(mine.base, picture, 3), mine.sampler_config()
        cond = mine.base.cond([picture], [prompt])
        ours = mine.base.decode(sample(mine.base, mine.role, cond, [3], recipe), cond.grids[0], 'np')[0]
        drawn = np.asarray(mine.edit(picture, 'candy', seed=3, size='working'))
    own = plain.scheduler
    plain.scheduler = type(own).from_config(config) if shift else own
    asked = dict(prompt=prompt, image=picture, output_resolution=64, output_type='np', num_inference_steps=3, **noise)
    theirs, bare = (plain(**asked, attention_kwargs={'scale': k}).images[0] for k in (1.0, 0.0))
    plain.scheduler = own
    assert np.abs(ours - theirs[..., :3]).max() < 1e-5 < 1e-3 < np.abs(bare - theirs).max()
    assert shift is None or np.abs(drawn / 255 - theirs[..., :3]).max() < 0.51 / 255


def test_the_header_and_the_card_speak_of_this_family(file, folder, tmp_path):
    header = read_header(file)
    assert (
        header['modelspec.architecture'] == 'Qwen-Image-2.1/lora' and header['ss_base_model_version'] == 'qwen_image_21'
    )
    assert header['modelspec.description'].startswith('Effects for Qwen-Image-2.1: candy, lava')
    card = model_card(inspect(file))
    assert (
        'QwenImage21Pipeline' in card
        and 'EditPlus' not in card
        and 'one with the node `TextEncodeQwenImage21`' in card
        and 'DiffSynth' not in card
    )
    mine = tmp_path / 'mine.safetensors'
    mine.write_bytes(file.read_bytes())
    assert [p.suffix for p in write_card(mine)] == ['.md', '.html', '.txt', '.json']
    assert base_identity('/x/Qwen-Image-2.1')['repo'] == 'Qwen/Qwen-Image-2.1'


# ComfyUI's node: its inputs; its outputs are a positive and a negative condition and a latent
NODE_21 = {'clip', 'prompt', 'negative_prompt', 'vae', 'resolution', 'images.image_1'}


@pytest.mark.parametrize('strength', [1.0, 0.6])
def test_the_workflow_is_made_of_the_nodes_of_this_family(file, strength):
    info = inspect(file)
    info['effects'][0]['strength'] = strength
    flow = comfyui_workflow(info, 'candy', seed=7)
    nodes = {n['_meta']['title']: (n['class_type'], n['inputs']) for n in flow.values()}
    kind, given = nodes['size']
    assert kind == 'TextEncodeQwenImage21' and set(given) == NODE_21 and given['prompt'] == 'candyx, make it candy'
    number = next(k for k, n in flow.items() if n['class_type'] == kind)
    assert nodes['sample'][1]['latent_image'] == [number, 2]
    assert flow[given['images.image_1'][0]]['class_type'] == 'LoadImage'
    guider, asked = nodes['guider']
    if strength == 1:
        assert guider == 'BasicGuider' and asked['conditioning'] == [number, 0]
    else:
        assert guider == 'CFGGuider' and asked['cfg'] == 0.6
        assert [asked['positive'], asked['negative']] == [[number, 0], [number, 1]]
    kinds = {n['class_type'] for n in flow.values()}
    assert not kinds & {'TextEncodeQwenImageEditPlus', 'FluxKontextImageScale', 'VAEEncode', 'ReferenceLatent'}
    loaded = {nodes[k][1][n] for k, n in (('model', 'unet_name'), ('clip', 'clip_name'), ('vae', 'vae_name'))}
    assert all('2.1' in name or 'qwen3vl' in name for name in loaded)
    wires = [v for n in flow.values() for v in n['inputs'].values() if isinstance(v, list)]
    assert all(v[0] in flow for v in wires)


def test_the_snippet_of_the_card_runs(file, folder, base, tmp_path, monkeypatch):
    code = re.search('```python\n(.*?)```', model_card(inspect(file)), re.S)[1]
    for name, value in ((f"'path/to/{folder.name}'", repr(str(folder))), ('bfloat16', 'float32')):
        assert name in code
        code = code.replace(name, value)
    code = code.replace('true_cfg_scale=1.0', 'true_cfg_scale=1.0, output_resolution=64')
    for name in (file.name,):
        (tmp_path / name).write_bytes(file.read_bytes())
    photo(7).save(tmp_path / 'input.png')
    monkeypatch.chdir(tmp_path)
    exec(compile(code, 'card', 'exec'), {})
    assert Image.open(tmp_path / 'output.png').size == (64, 64)


@pytest.mark.parametrize('dialect', ['canonical', 'diffusers', 'peft', 'lightning', 'diffsynth', 'ai-toolkit'])
def test_every_dialect_is_read_back_exactly(dialect, file, base, tmp_path):
    alpha = 6.0 if DIALECTS[dialect].alpha else None
    path = tmp_path / ('x' if dialect == 'peft' else 'x.safetensors')
    convert(file, path, dialect, out_alpha=alpha)
    mine, again = read_lora(file), read_lora(path, base.backbone.modules())
    assert set(again.factors) == set(mine.factors) and again.meta['family'] == 'qwen-image-2.1'
    far = max((again.delta(n) - mine.delta(n)).abs().max() / mine.delta(n).abs().max() for n in mine.factors)
    assert far < 1e-6
    if alpha:
        assert set(read_lora(path).meta['scales'].values()) == {2.0}


@pytest.mark.parametrize('dialect', ['canonical', 'diffusers', 'lightning', 'kohya'])
def test_the_stock_loader_reads_it_at_the_right_strength(dialect, file, folder, base, tmp_path):
    path, without = tmp_path / 'x.safetensors', ['*.gate_layer'] if dialect == 'kohya' else []
    convert(file, path, dialect, out_alpha=6.0 if DIALECTS[dialect].alpha else None, without=without)
    transformer = load_pipe(folder, torch.float32, vae=None, text_encoder=None)
    transformer.load_lora_weights(str(tmp_path), weight_name=path.name)
    with torch.no_grad():
        cond, x, t = base.cond([photo(1)], [PROMPT]), flow.noise_like((1, 16, 16), [1]), torch.tensor([0.5])
        theirs = Backbone21.predict(Backbone21(transformer.transformer), x, t, cond)
        b = load_base(folder).backbone
        b.add_role('mine', 3)
        b.load('mine', read_lora(path))
        ours, bare = b.velocity('mine', x, t, cond), b.velocity('base', x, t, cond)
    assert (ours - theirs).abs().max() < 1e-5 < 1e-2 < (ours - bare).abs().max()


def test_flat_names_are_not_written_where_diffusers_would_drop_a_layer(file, base, tmp_path):
    with pytest.raises(UserError, match='gate_layer.*kohya'):
        convert(file, tmp_path / 'x.safetensors', 'kohya')
    assert not (tmp_path / 'x.safetensors').exists()
    names = {unflatten(n.replace('.', '_')): n for n in base.backbone.modules()}
    assert all(k == v for k, v in names.items())  # they are read, whoever wrote them


def test_a_lora_of_the_other_family_is_refused(file, base, folder, tmp_path):
    first = load_base(tiny_base(tmp_path / 'first'))
    other = tmp_path / 'other.safetensors'
    write_lora(other, random_lora(first.backbone.modules(), 2))
    with pytest.raises(UserError, match='belongs to Qwen-Image-Edit; .* another model than Qwen-Image-2.1'):
        read_lora(other, base.backbone.modules(), allow_missing=True)
    with pytest.raises(UserError, match='belongs to Qwen-Image-2.1; .* another model than Qwen-Image-Edit'):
        read_lora(file, first.backbone.modules(), allow_missing=True)
    mixed = Lora({**read_lora(file).factors, **read_lora(other).factors})
    write_lora(tmp_path / 'mixed.safetensors', mixed)
    with pytest.raises(UserError, match='not all of one family'):
        read_lora(tmp_path / 'mixed.safetensors')
    attention = Lora({n: f for n, f in read_lora(file).factors.items() if n.endswith('to_q')})
    header = {'modelspec.architecture': 'qwen_image_21'}
    write_lora(tmp_path / 'attention.safetensors', attention, header)
    assert read_lora(tmp_path / 'attention.safetensors', base.backbone.modules(), allow_missing=True).rank == 3
    with pytest.raises(UserError, match='modelspec.architecture.*another model than Qwen-Image-Edit'):
        read_lora(tmp_path / 'attention.safetensors', first.backbone.modules(), allow_missing=True)


# --- the whole chain


SHAPES = ((96, 64), (64, 96), (80, 80), (160, 60), (60, 140))


def five_shapes(folder, id, seed):
    "An effect of five photographs of five shapes, and their targets."
    draw = np.random.default_rng(seed)
    soft = lambda size: Image.fromarray(draw.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize(size, 3)
    pairs = [(im, Image.eval(im, lambda x: 255 - x)) for im in map(soft, SHAPES)]
    words = dict(prompt=f'make it {id}', trigger=f'{id}x', description=f'turn the picture into {id}')
    return write_effect(folder / id, id=id, category='object', pairs=pairs, **words).folder


def asked(*words):
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.slow
@pytest.mark.parametrize('family', ['first', 'second'])
def test_the_chain_from_photographs_of_five_shapes_to_a_file_for_the_stock_pipeline(family, folder, tmp_path):
    base = folder if family == 'second' else tiny_base(tmp_path / 'base')
    candy, lava, snow = (five_shapes(tmp_path / 'effects', id, i) for i, id in enumerate(('candy', 'lava', 'snow')))
    on = ('--base', base, '--device', 'cpu', '--out', tmp_path / 'mine')
    small = ('-p', 'steps=2', '-p', 'batch=2', '-p', 'rank=2')
    for effect in (candy, lava, snow):
        asked('teach', effect, *on, *small, '-p', 'validate=0')
    files = tmp_path / 'mine' / 'teachers'
    quick = (*small, '-p', 'settings={p_switch: 1, few_steps: 3, fake_warmup: 1, sampler: ode}')
    asked('distill', candy, lava, '--teachers', files, *on, *quick)
    collection = tmp_path / 'mine' / 'collection.safetensors'
    assert read_header(collection)['modelspec.architecture'] == family_of_folder(base).architecture
    more = ('--out', tmp_path / 'more', '--base', base, '--device', 'cpu', '-p', 'settings={p_switch: 1}')
    asked('distill', snow, '--teachers', files, '--extend', collection, '--old', candy, '--old', lava, *more, *small)
    extended = tmp_path / 'more' / 'collection.safetensors'
    assert [e['id'] for e in read_header(extended)['collectionlora.effects']] == ['candy', 'lava', 'snow']
    asked('edit', candy / 'source', 'snow', '--collection', extended, '--base', base, '--out', tmp_path / 'edits')
    assert len({Image.open(p).size for p in (tmp_path / 'edits').rglob('*.png')}) == 5
    out = asked('inspect', extended, '--base', base, '--json')
    assert json.loads(out)['report']['missing'] == 0
    asked('convert', extended, tmp_path / 'plain.safetensors', '--dialect', 'diffusers')
    pipe = load_pipe(base, torch.float32)
    pipe.load_lora_weights(str(tmp_path), weight_name='plain.safetensors')


SHORT = {
    'baseline_fm': {'steps': 4, 'batch': 4},
    'targets': {'steps': 2, 'batch': 4},
    'distill': {'steps': 6, 'batch': 4, 'val_every': 0, 'settings': {'anchor_first': 4, 'routes': 2}},
}


@pytest.mark.slow
@pytest.mark.parametrize('family', ['first', 'second'])
def test_two_processes_walk_the_chain_to_the_collection_of_one(family, folder, tmp_path, monkeypatch):
    base, own = folder if family == 'second' else tiny_base(tmp_path / 'base'), chain.differences
    short = lambda experiment, budget: {**own(experiment, budget), **SHORT.get(experiment, {})}
    monkeypatch.setattr(chain, 'differences', short)
    effects = [five_shapes(tmp_path / 'effects', id, i) for i, id in enumerate(('candy', 'lava'))]
    on, small = ('--base', base, '--device', 'cpu', '--budget', 'demo'), ('-p', 'rank=2')
    few = ('-p', 'steps=2', '-p', 'batch=3', '-p', 'validate=0')
    asked('teach', *effects, *on, *small, *few, '--out', tmp_path, '--processes', 2)
    settings = ('-p', 'settings={p_switch: 1, few_steps: 3, fake_warmup: 1}')
    for n in (1, 2):
        given = (*on, *small, *settings, '--out', tmp_path / str(n), '--processes', n)
        asked('distill', *effects, '--teachers', tmp_path / 'teachers', *given)
    for name in ('all_in_one', 'collection'):  # flow matching on the effects' own pairs, and what starts from it
        one, two = (read_lora(tmp_path / str(n) / f'{name}.safetensors').factors for n in (1, 2))
        assert one.keys() == two.keys()
        assert all((a - b).abs().max() < 1e-5 for k in one for a, b in zip(one[k], two[k]))
    painted = [[p.read_bytes() for p in sorted((tmp_path / str(n) / 'targets').rglob('*.png'))] for n in (1, 2)]
    assert painted[0] == painted[1] and len(painted[0]) >= 20


# --- plans, and a machine without torchvision


def test_the_plan_of_a_pass_is_what_a_pass_holds(tmp_path):
    from collectionlora.bases.counted import gradient_into, Live, own_tensors, pass_of, weights_of_base
    from collectionlora.bases.sizes import sample_of

    place = tiny_qwen21(tmp_path / 'five', num_layers=5)
    b, small = load_base(place).backbone, sample_of(place, text=20)
    b.add_role('counted', 4)
    buffer = torch.zeros_like(b.flat('counted'))
    gradient_into(b, 'counted', buffer)
    x, t = torch.zeros(2, small.tokens, small.channels), torch.full((2,), 0.5)
    cond = Cond(
        torch.zeros(2, small.source, small.channels), torch.zeros(2, small.text, small.width), None, small.grids
    )
    with Live(*own_tensors(b), buffer, x, t, cond.source, cond.emb) as live:
        b.velocity('counted', x, t, cond).square().mean().backward()
    assert pass_of(place, small, 2, 4, torch.float32, False).gradient == pytest.approx(live.peak, rel=0.05)
    held = sum(p.numel() for n, p in b.transformer.named_parameters() if '.lora_' not in n)
    assert weights_of_base(place).transformer == held


WITHOUT_TORCHVISION = NO_TORCHVISION + """import numpy as np
from PIL import Image
from collectionlora.bases.pipeline import load_base
base = load_base(sys.argv[1])
image = Image.fromarray(np.load(sys.argv[2]))
emb, mask = base.encode_prompts([image, image], ['make the cat red', 'swap'])
np.save(sys.argv[3], emb.numpy())
base.pipe('swap', image, output_resolution=64, num_inference_steps=2)
assert 'torchvision' not in sys.modules and type(base.pipe.processor).__name__ == 'ChatProcessor'
"""


@pytest.mark.slow
def test_it_loads_encodes_and_paints_without_torchvision(base, folder, tmp_path):
    image, files = photo(1), (tmp_path / 'image.npy', tmp_path / 'emb.npy')
    np.save(files[0], np.asarray(image))
    subprocess.run([sys.executable, '-W', 'ignore', '-c', WITHOUT_TORCHVISION, folder, *files], check=True)
    emb, _ = base.encode_prompts([image, image], ['make the cat red', 'swap'])
    assert np.abs(np.load(files[1]) - emb.numpy()).max() < 0.02  # the two resize an image by a rounding apart
