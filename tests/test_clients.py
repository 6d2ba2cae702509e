"""What other programs do with our files, restated from their sources: node definitions, rules of times and sizes, fields that managers read, the hub's card."""

import json, math

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml

from collectionlora.core import collection_dir, sha256_file, UserError
from collectionlora.files.card import inspect, model_card, write_card
from collectionlora.files.clients import comfyui_view
from collectionlora.files.dialects import Lora
from collectionlora.files.header import base_identity, modelspec, read_header, read_table, verify
from collectionlora.files.lora import convert, delta_norm, read_lora, write_lora
from collectionlora.files.workflow import comfyui_workflow, diffsynth_default, diffsynth_lines, diffsynth_sigmas
from collectionlora.files.workflow import grid_shift, grid_times, sampler_name, simple_sigmas

COLLECTION = collection_dir() / 'collection.safetensors'

# Inputs of ComfyUI's nodes: name -> (version, year-month since which they exist, required, optional). Sources: nodes.py,
# comfy_extras/nodes_custom_sampler.py, nodes_model_advanced.py, nodes_qwen.py, nodes_edit_model.py, nodes_flux.py.
NODES = {
    'UNETLoader': ('0.1', '2024-08', {'unet_name', 'weight_dtype'}, set()),
    'CLIPLoader': ('0.1', '2024-08', {'clip_name', 'type'}, {'device'}),
    'VAELoader': ('0.1', '2024-08', {'vae_name'}, set()),
    'LoraLoaderModelOnly': ('0.1', '2024-08', {'model', 'lora_name', 'strength_model'}, set()),
    'LoadImage': ('0.1', '2024-08', {'image'}, set()),
    'VAEEncode': ('0.1', '2024-08', {'pixels', 'vae'}, set()),
    'VAEDecode': ('0.1', '2024-08', {'samples', 'vae'}, set()),
    'SaveImage': ('0.1', '2024-08', {'images', 'filename_prefix'}, set()),
    'KSamplerSelect': ('0.1', '2024-08', {'sampler_name'}, set()),
    'RandomNoise': ('0.1', '2024-08', {'noise_seed'}, set()),
    'BasicGuider': ('0.1', '2024-08', {'model', 'conditioning'}, set()),
    'CFGGuider': ('0.1', '2024-08', {'model', 'positive', 'negative', 'cfg'}, set()),
    'BasicScheduler': ('0.1', '2024-08', {'model', 'scheduler', 'steps', 'denoise'}, set()),
    'ModelSamplingAuraFlow': ('0.1', '2024-08', {'model', 'shift'}, set()),
    'SamplerCustomAdvanced': ('0.1', '2024-08', {'noise', 'guider', 'sampler', 'sigmas', 'latent_image'}, set()),
    'FluxKontextImageScale': ('0.3.42', '2025-06', {'image'}, set()),
    'ReferenceLatent': ('0.3.42', '2025-06', {'conditioning'}, {'latent'}),
    'TextEncodeQwenImageEditPlus': ('0.3.60', '2025-09', {'clip', 'prompt'}, {'vae', 'image1', 'image2', 'image3'}),
    'ManualSigmas': ('0.7.0', '2025-12', {'sigmas'}, set()),
}
KONTEXT = [(672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104)]
SIZES = [*KONTEXT, (1024, 1024), *((h, w) for w, h in KONTEXT)]  # PREFERED_KONTEXT_RESOLUTIONS


def info(times=None, **effect):
    effects = [dict(id='candy', category='animal', trigger='zon', prompt='zon, candy') | effect]
    return inspect(COLLECTION) | dict(
        file='c.safetensors', effects=effects, sampling=dict(times=times or grid_times(3, 8), cfg=1.0, stochastic=True)
    )


def nodes_of(flow):
    return {n['_meta']['title']: (n['class_type'], n['inputs']) for n in flow.values()}


@pytest.mark.parametrize('strength', [1.0, 0.6])
@pytest.mark.parametrize('times', [grid_times(1, 4), grid_times(3, 8), [1.0, 0.7, 0.1]])
def test_every_node_and_input_exists_and_manual_sigmas_alone_is_new(times, strength):
    flow = comfyui_workflow(info(times, strength=strength))
    for node in flow.values():
        _, _, required, optional = NODES[node['class_type']]
        assert required <= set(node['inputs']) <= required | optional, node
        assert all(v[0] in flow and v[1] == 0 for v in node['inputs'].values() if isinstance(v, list))
    kinds = {n['class_type'] for n in flow.values()}
    assert ('ManualSigmas' in kinds) == (times == [1.0, 0.7, 0.1]) != ('BasicScheduler' in kinds)


@pytest.mark.parametrize('shift', [1.0, 2.2, 3.0])
@pytest.mark.parametrize('steps', [1, 2, 4, 5, 8, 10])
def test_times_from_nodes_that_every_version_has_are_the_headers(steps, shift):
    times = grid_times(shift, steps)
    nodes = nodes_of(comfyui_workflow(info(times)))
    kind, asked = nodes['sigmas']
    assert kind == 'BasicScheduler' and asked['scheduler'] == 'simple' and asked['denoise'] == 1
    made = simple_sigmas(nodes['shifted'][1]['shift'], asked['steps'])
    assert np.allclose(made, times, atol=1e-6)
    assert nodes['guider'][1]['model'] == asked['model']  # the sampler and its times use one model


def test_the_reference_is_the_canvas():
    nodes = nodes_of(comfyui_workflow(info()))
    assert 'vae' not in nodes['prompt'][1] and nodes['asked'][0] == 'ReferenceLatent'
    assert nodes['asked'][1]['latent'] == nodes['sample'][1]['latent_image']
    own = lambda w, h: tuple(
        round(v * math.sqrt(1024 * 1024 / (w * h)) / 8) * 8 for v in (w, h)
    )  # with vae: its own size
    assert len(SIZES) == 17 and sum(own(w, h) != (w, h) for w, h in SIZES) == 6


def test_a_catalogue_strength_is_the_guiders_scale_against_a_prompt_that_asks_nothing():
    assert nodes_of(comfyui_workflow(info()))['guider'][0] == 'BasicGuider'
    nodes = nodes_of(comfyui_workflow(info(strength=0.6)))
    assert nodes['guider'][0] == 'CFGGuider' and nodes['guider'][1]['cfg'] == 0.6
    assert nodes['nothing'][1]['prompt'] == ' ' and nodes['unasked'][1]['latent'] == nodes['asked'][1]['latent']


def test_the_sampler_is_chosen_in_one_place():
    assert sampler_name({'stochastic': True}) == 'lcm' and sampler_name({'stochastic': False}) == 'euler'
    ode = info()
    ode['sampling'] = ode['sampling'] | {'stochastic': False}
    assert nodes_of(comfyui_workflow(ode))['sampler'][1] == {'sampler_name': 'euler'} and '`euler`' in model_card(ode)
    assert '`lcm`' in model_card(info())


def test_a_closing_zero_in_the_header_changes_nothing():
    with_zero = info()
    with_zero['sampling'] = with_zero['sampling'] | {'times': [*grid_times(3, 8), 0.0], 'stochastic': False}
    without = info()
    without['sampling'] = without['sampling'] | {'stochastic': False}
    assert comfyui_workflow(with_zero) == comfyui_workflow(without) and model_card(with_zero) == model_card(without)


def test_diffsynth_makes_the_times_with_the_lightning_scheduler_and_not_by_default():
    assert np.allclose(diffsynth_sigmas(3, 8), grid_times(3, 8), atol=1e-12)
    away = np.abs(np.subtract(diffsynth_default(8), grid_times(3, 8))).max()
    assert 0.2 < away < 0.35  # the .28 that was measured
    card = model_card(info())
    assert 'FlowMatchScheduler("Qwen-Image-Lightning")' in card and 'exponential_shift_mu=math.log(3)' in card
    for code in card.split('```python\n')[1:]:
        compile(code.split('```')[0], 'card', 'exec')
    assert diffsynth_lines(info([1.0, 0.7, 0.1]), 'p') is None and 'needs version 0.7' in model_card(
        info([1.0, 0.7, 0.1])
    )


def test_grid_shift_knows_grids_and_nothing_else():
    for shift in (0.5, 1.0, 3.0, 7.3):
        for n in (2, 4, 8, 40):
            assert grid_shift(grid_times(shift, n)) == pytest.approx(shift, abs=1e-5)
    for times in ([], [0.9, 0.5], [1.0, 0.0], [1.0, 1.0], [1.0, 0.7, 0.1], [1.0, 0.5, 0.6]):
        assert grid_shift(times) is None


# ---- what managers read


def small(path, header):
    g = torch.Generator().manual_seed(0)
    names = ['transformer_blocks.0.attn.to_q', 'transformer_blocks.0.img_mod.1', 'transformer_blocks.0.txt_mod.1']
    factors = {n: (torch.randn(2, 8, generator=g), torch.randn(8, 2, generator=g)) for n in names}
    write_lora(path, Lora(factors), header)
    return factors


SHOT = 'data:image/jpeg;base64,AAAA'
HEADER = {
    'collectionlora.effects': [
        dict(id='candy', category='animal', trigger='zon', prompt='zon, candy', thumbnail=SHOT),
        dict(id='rain', category='animal', trigger='mip'),
    ],
    'collectionlora.sampling': {'times': grid_times(1, 4), 'stochastic': True},
    'collectionlora.base': {'id': 'Qwen-Image-Edit-2509', 'repo': 'Qwen/Qwen-Image-Edit-2509'},
}


def test_managers_find_base_description_hash_and_pictures(tmp_path):
    path = tmp_path / 'c.safetensors'
    small(path, HEADER)
    raw = read_table(path).metadata
    payload = path.read_bytes()[8 + int.from_bytes(path.read_bytes()[:8], 'little') :]
    import hashlib

    assert raw['modelspec.hash_sha256'] == '0x' + hashlib.sha256(payload).hexdigest()
    assert raw['ss_base_model_version'] == 'qwen_image_edit' and 'candy, rain' in raw['modelspec.description']
    assert raw['modelspec.thumbnail'] == SHOT and json.loads(raw['ssmd_cover_images']) == ['AAAA']
    assert verify(path) is None and set(json.loads(raw['ss_tag_frequency'])['effects']) == {'zon', 'mip'}
    first = sha256_file(path)
    small(path, HEADER)
    assert sha256_file(path) == first  # equal content, equal bytes: no date is written
    convert(path, tmp_path / 'k.safetensors', 'kohya')
    convert(tmp_path / 'k.safetensors', tmp_path / 'again.safetensors')
    assert sha256_file(tmp_path / 'again.safetensors') == first
    assert 'modelspec.thumbnail' not in modelspec({}) and 'ss_base_model_version' not in modelspec({})


# ---- the hub's card


def test_the_card_says_base_licence_prompt_and_widget(tmp_path):
    path = tmp_path / 'c.safetensors'
    small(path, HEADER | {'modelspec.license': 'Apache 2.0'})
    card = write_card(path)[0].read_text()
    front = yaml.safe_load(card.split('---')[1])
    assert front['base_model'] == 'Qwen/Qwen-Image-Edit-2509' and front['base_model_relation'] == 'adapter'
    assert front['license'] == 'apache-2.0' and front['instance_prompt'] == 'zon'
    assert front['widget'] == [{'text': 'zon, candy'}, {'text': 'mip'}]
    assert 'set_adapters' in card and '--strength 0.5' in card and '--without modulation' in card
    small(path, HEADER | {'modelspec.license': "My Company's Own 3"})
    front = yaml.safe_load(write_card(path)[0].read_text().split('---')[1])
    assert (front['license'], front['license_name']) == ('other', "My Company's Own 3")


@pytest.mark.parametrize(
    'folder, told',
    [
        ('/c/models--Qwen--Qwen-Image-Edit-2509/snapshots/0a1b', 'Qwen/Qwen-Image-Edit-2509'),
        ('/c/models--me--a--b/snapshots/0a1b', 'me/a--b'),
        ('models/Qwen-Image-Edit', 'Qwen/Qwen-Image-Edit'),
        ('/home/me/bases/mine', None),
        ('/home/me/snapshots/0a1b2c', None),
    ],
)
def test_a_base_is_its_address_and_never_a_path(folder, told, tmp_path):
    said = base_identity(folder)
    assert said.get('repo') == told and '/' not in said['id'] and 'home' not in json.dumps(said)
    path = tmp_path / 'c.safetensors'
    small(path, HEADER | {'collectionlora.base': said})
    assert yaml.safe_load(model_card(inspect(path)).split('---')[1]).get('base_model') == told


@pytest.mark.parametrize('id', ['/home/me/base', 'home/me/base', './base/x', '../x/y', 'a b/c'])
def test_a_path_in_an_older_header_is_no_base_model(id, tmp_path):
    path = tmp_path / 'c.safetensors'
    small(path, HEADER | {'collectionlora.base': {'id': id}})
    assert 'base_model' not in yaml.safe_load(model_card(inspect(path)).split('---')[1])


# ---- layers left out


def test_without_modulation_is_what_those_programs_see_and_says_what_it_lacks(tmp_path):
    factors = small(tmp_path / 'c.safetensors', HEADER)
    said = convert(tmp_path / 'c.safetensors', tmp_path / 'w.safetensors', without=['modulation'])
    kept = read_lora(tmp_path / 'w.safetensors').factors
    assert list(kept) == ['transformer_blocks.0.attn.to_q'] and said['left_out']['modules'] == 2
    squares = {n: delta_norm(*f) ** 2 for n, f in factors.items()}
    share = 1 - squares['transformer_blocks.0.attn.to_q'] / sum(squares.values())
    assert (
        said['left_out']['share'] == pytest.approx(share)
        and read_header(tmp_path / 'w.safetensors')['collectionlora.effects']
    )
    for pattern, word in (('*', 'every module'), ('nothing', 'no module')):
        with pytest.raises(UserError, match=word):
            convert(tmp_path / 'c.safetensors', tmp_path / 'v.safetensors', without=[pattern])


def test_the_share_counts_alpha(tmp_path):
    factors = small(tmp_path / 'c.safetensors', HEADER)
    convert(tmp_path / 'c.safetensors', tmp_path / 'k.safetensors', 'kohya', out_alpha=8.0)
    one = convert(tmp_path / 'c.safetensors', tmp_path / 'a.safetensors', without=['modulation'])['left_out']['share']
    two = convert(tmp_path / 'k.safetensors', tmp_path / 'b.safetensors', without=['modulation'])['left_out']['share']
    assert (
        one == pytest.approx(two)
        and len(comfyui_view(safetensors.torch.load_file(tmp_path / 'b.safetensors'), factors)) == 1
    )
