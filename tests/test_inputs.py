"""Files and folders as people really have them: strength in every place, other models' LoRAs, lookalikes, rewritten headers, names and encodings."""

import json, struct, subprocess, sys, unicodedata, zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import example, given, HealthCheck, settings, strategies as st
from PIL import Image

from collectionlora.core import collection_dir, nano_dir, UserError
from collectionlora.files.dialects import Lora, lora_hash
from collectionlora.files.effects import load_effect, load_general, write_effect
from collectionlora.files.header import catalogue, MAX_HEADER, read_header, read_table, verify
from collectionlora.files.lora import convert, read_lora, report, write_lora
from collectionlora.files.weights import configs_beside, find_weights, what_it_is

RANK, WIDTH = 2, 8
NAMES = [f'transformer_blocks.{b}.attn.{leaf}' for b in range(2) for leaf in ('to_q', 'to_k')]
_g = torch.Generator().manual_seed(0)
FACTORS = {n: (torch.randn(RANK, WIDTH, generator=_g), torch.randn(WIDTH, RANK, generator=_g)) for n in NAMES}
TEACHER = collection_dir() / 'teachers' / 'candy_world.safetensors'


def named(prefix='diffusion_model.', a='lora_A', b='lora_B', adapter='', flat=False, alpha=None):
    "The tensors of `FACTORS` in one spelling, written without the code under test."
    out = {}
    for n, (fa, fb) in FACTORS.items():
        stem = prefix + (n.replace('.', '_') if flat else n)
        out[f'{stem}.{a}{adapter}.weight'], out[f'{stem}.{b}{adapter}.weight'] = fa.clone(), fb.clone()
        if alpha is not None:
            out[f'{stem}.alpha'] = torch.tensor(float(alpha))
    return out


KOHYA = dict(prefix='lora_unet_', a='lora_down', b='lora_up', flat=True)


def save(path, tensors, metadata=None):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, path, metadata)
    return path


def scale_of(path, **kw):
    "The scale that is applied to every module, from what was read and not from what was said."
    got = read_lora(path, **kw)
    scales = {
        round(float((b @ a).norm() / (FACTORS[n][1] @ FACTORS[n][0]).norm()), 4) for n, (a, b) in got.factors.items()
    }
    assert len(scales) == 1 and report(got)['scale'] == pytest.approx(list(scales), rel=1e-3)
    return scales.pop()


# ---- 1. strength

JOB = {'network': {'type': 'lora', 'linear': RANK, 'linear_alpha': 8}}
FIELDS = {
    'lora_alpha': (dict(), {'lora_alpha': '8'}, 4),
    'network_alpha': (dict(), {'network_alpha': '8.0', 'network_dim': '2'}, 4),
    'alpha': (dict(), {'alpha': '1', 'rank': '2'}, 0.5),
    'nested': (dict(), {'config': json.dumps({'adapter': {'lora_alpha': 8, 'lora_rank': 2}})}, 4),
    'rsLoRA': (dict(), {'lora_alpha': '8', 'use_rslora': 'true'}, 8 / 2**0.5),
    'camel case': (dict(), {'loraAlpha': '8'}, 4),
    'every module': (dict(), {f'{n}.alpha': '8' for n in NAMES}, 4),
    'a mapping by module': (dict(), {'network_alphas': json.dumps({f'transformer.{n}.alpha': 8 for n in NAMES})}, 4),
    'agrees with the tensors': (dict(alpha=8), {'lora_alpha': '8'}, 4),
    'with another prefix': (dict(prefix='transformer.'), {'lora_alpha': '8'}, 4),
    'DiffSynth names': (dict(prefix='', adapter='.default'), {'lora_alpha': '8'}, 4),
    'PEFT names': (dict(prefix='base_model.model.'), {'lora_alpha': '8'}, 4),
    # weights that already contain what the trainer was told, and alphas of other things
    'musubi, converted': (dict(), {'ss_network_alpha': '8', 'ss_network_dim': '2'}, 1),
    "ai-toolkit's job": (dict(), {'software': '{"name": "ai-toolkit"}', 'job': json.dumps(JOB)}, 1),
    'kohya': (KOHYA | dict(alpha=8), {'ss_network_alpha': '8'}, 4),
    'kohya, told otherwise': (KOHYA | dict(alpha=8), {'ss_network_alpha': '2'}, 4),
    'of something else': (dict(), {'ss_alpha_mask': '0', 'conv_alpha': '4', 'optim': '{"optimizer": {"alpha": 5}}'}, 1),
    'nothing in it': (dict(), {'lora_alpha': 'None', 'alpha_pattern': '{}'}, 1),
}


@pytest.mark.parametrize('name', FIELDS)
def test_a_header_field_that_says_alpha_is_applied(name, tmp_path):
    spelling, metadata, want = FIELDS[name]
    path = save(tmp_path / 'x.safetensors', named(**spelling), metadata)
    assert scale_of(path) == pytest.approx(want, rel=1e-3)


UNCLEAR = {
    'tensors and field': (dict(alpha=8), {'lora_alpha': '4'}, 'different scales'),
    'two fields': (dict(), {'lora_alpha': '8', 'network_alpha': '4'}, 'lora_alpha and network_alpha give'),
    'two places': (dict(), {'lora_alpha': '8', 'config': '{"network": {"alpha": 4}}'}, 'config.network.alpha'),
    'no number': (dict(), {'lora_alpha': 'sixteen'}, 'lora_alpha'),
    'another rank': (dict(), {'lora_alpha': '8', 'lora_rank': '16'}, 'lora_alpha gives module .* rank 16'),
    'some modules': (dict(), {f'{NAMES[0]}.alpha': '8'}, 'no alpha for module'),
    'unknown words': (dict(), {'alpha_strength': '8'}, 'alpha_strength'),
    'kohya names without tensors': (KOHYA, {'ss_network_alpha': '8'}, 'ss_network_alpha'),
}


@pytest.mark.parametrize('name', UNCLEAR)
def test_what_cannot_be_known_is_refused_with_the_fields_and_the_argument_decides(name, tmp_path):
    spelling, metadata, match = UNCLEAR[name]
    path = save(tmp_path / 'x.safetensors', named(**spelling), metadata)
    with pytest.raises(UserError, match=match) as e:
        read_lora(path)
    assert '--alpha' in str(e.value) and str(path) in str(e.value)
    assert scale_of(path, alpha=8.0) == 4
    if 'alpha' in spelling:  # every program applies the tensors, so they cannot be overruled
        with pytest.raises(UserError, match='different scales'):
            read_lora(path, alpha=2.0)


AUTHORS = 'r: 2\nalpha: 8\ndropout: 0.0\ntarget_modules: [to_q, to_k]\n'
PEFT = json.dumps({'peft_type': 'LORA', 'r': 2, 'lora_alpha': 8})


@pytest.mark.parametrize(
    'prefix', ['diffusion_model.', 'transformer.', '', 'base_model.model.', 'model.base_model.model.']
)
@pytest.mark.parametrize(
    'file, config, text',
    [
        ('model.safetensors', 'lora_config/adapter_config.yaml', AUTHORS),
        ('mine.safetensors', 'adapter_config.yml', AUTHORS),
        ('adapter_model.safetensors', 'adapter_config.json', PEFT),
        ('mine.safetensors', 'lora_config/adapter_config.json', PEFT),
    ],
)
def test_a_config_is_applied_whatever_the_names_of_the_tensors(prefix, file, config, text, tmp_path):
    path = save(tmp_path / file, named(prefix))
    (tmp_path / config).parent.mkdir(exist_ok=True)
    (tmp_path / config).write_text(text)
    assert scale_of(path) == scale_of(tmp_path) == 4
    (tmp_path / config).write_text(text.replace('8', '4'))
    assert scale_of(path) == 2


def test_a_config_belongs_to_the_lora_that_it_was_saved_with(tmp_path):
    save(tmp_path / 'adapter_model.safetensors', named('base_model.model.'))
    (tmp_path / 'adapter_config.json').write_text(PEFT)
    synth = save(tmp_path / 'candy.safetensors', named('', adapter='.default'))
    peft = save(tmp_path / 'other.safetensors', named('base_model.model.'))
    assert scale_of(tmp_path / 'adapter_model.safetensors') == 4 and scale_of(synth) == 1
    assert 'belongs to adapter_model.safetensors' in read_lora(synth).meta['notes'][-1]
    with pytest.raises(UserError, match='belongs to adapter_model.safetensors.*--alpha'):
        read_lora(peft)
    assert scale_of(peft, alpha=2.0) == 1
    (tmp_path / 'adapter_model.safetensors').unlink()  # now nobody knows whose it is
    with pytest.raises(UserError, match='adapter_config.json.*--alpha'):
        read_lora(synth)
    peft.unlink()
    assert scale_of(synth) == 4 and find_weights(tmp_path)[1].name == 'adapter_config.json'


def test_two_configs_must_agree_and_a_variant_is_refused_whatever_alpha_is_given(tmp_path):
    path = save(tmp_path / 'adapter_model.safetensors', named())
    (tmp_path / 'adapter_config.json').write_text(PEFT)
    (tmp_path / 'adapter_config.yaml').write_text(AUTHORS)
    assert scale_of(path) == 4
    (tmp_path / 'adapter_config.yaml').write_text(AUTHORS.replace('8', '2'))
    with pytest.raises(UserError, match='adapter_config.json and adapter_config.yaml give different scales'):
        read_lora(path)
    assert scale_of(path, alpha=8.0) == 4
    (tmp_path / 'adapter_config.yaml').write_text(AUTHORS + 'use_dora: true\n')
    with pytest.raises(UserError, match='use_dora'):
        read_lora(path, alpha=8.0)


def test_our_own_file_means_the_same_beside_any_config(tmp_path):
    write_lora(tmp_path / 'mine.safetensors', Lora(FACTORS))
    (tmp_path / 'adapter_config.json').write_text(PEFT)
    assert scale_of(tmp_path / 'mine.safetensors') == 1
    with pytest.raises(UserError, match='would be applied'):
        convert(tmp_path / 'mine.safetensors', tmp_path / 'adapter_model.safetensors', 'diffusers')


# ---- 2. other models

OTHERS = [
    {'ss_base_model_version': 'flux1'},
    {'ss_base_model_version': 'sdxl_base_v1-0'},
    {'ss_base_model_version': 'somebodys_new_model'},
    {'modelspec.architecture': 'stable-diffusion-3.5-medium/lora'},
    {'base_model_name_or_path': 'black-forest-labs/FLUX.1-dev'},
    {'base_model': 'Qwen/Qwen2.5-7B-Instruct'},
    {'training_info': json.dumps({'step': 9, 'base_model': 'Wan-AI/Wan2.2-T2V-A14B'})},
    {'config': json.dumps({'process': [{'model': {'name_or_path': 'black-forest-labs/FLUX.1-dev', 'arch': 'flux'}}]})},
    {'model_id_with_origin_paths': 'black-forest-labs/FLUX.1-Kontext-dev'},
    {'ss_sd_model_name': 'hunyuan_video_t2v.safetensors'},
    {
        'lora_adapter_metadata': json.dumps(
            {
                'transformer.r': 2,
                'transformer.lora_alpha': 2,
                'transformer.base_model_name_or_path': '/x/models--black-forest-labs--FLUX.1-dev/snapshots/ab',
            }
        )
    },
]
OURS = [
    {'ss_base_model_version': 'qwen_image_edit_plus'},
    {'modelspec.architecture': 'Qwen-Image-Edit-Plus/lora'},
    {'base_model': 'Qwen/Qwen-Image-Edit-2511'},
    {'base_model': '/data/flux/projects/x/my_base'},
]


@pytest.mark.parametrize('metadata', OTHERS, ids=lambda m: next(iter(m)))
def test_another_models_lora_is_refused_with_the_field(metadata, tmp_path):
    path = save(tmp_path / 'x.safetensors', named('transformer.'), metadata)
    with pytest.raises(UserError, match='another model') as e:
        read_lora(path)
    assert next(iter(metadata)) in str(e.value)


@pytest.mark.parametrize('metadata', OURS, ids=lambda m: next(iter(m)))
def test_our_models_names_are_read(metadata, tmp_path):
    got = read_lora(save(tmp_path / 'x.safetensors', named('transformer.'), metadata))
    assert len(got.factors) == 4


def test_a_config_beside_the_file_names_the_base_too(tmp_path):
    path = save(tmp_path / 'adapter_model.safetensors', named('base_model.model.'))
    config = json.loads(PEFT) | {'base_model_name_or_path': 'black-forest-labs/FLUX.1-dev'}
    (tmp_path / 'adapter_config.json').write_text(json.dumps(config))
    with pytest.raises(UserError, match='adapter_config.json.*base_model_name_or_path.*another model'):
        read_lora(path)


def test_what_would_fit_flux_is_said_and_what_would_not_is_not(tmp_path):
    path = save(tmp_path / 'x.safetensors', named('transformer.'))
    assert 'no field names its base' in report(read_lora(path))['notes'][0]
    named_one = save(tmp_path / 'n.safetensors', named('transformer.'), {'ss_base_model_version': 'qwen_image_edit'})
    assert 'notes' not in report(read_lora(named_one))
    plain = save(tmp_path / 't.safetensors', named('transformer.'), {'ss_base_model_version': 'qwen_image'})
    assert 'not for its edit model' in report(read_lora(plain))['notes'][0]
    own = {k: v for k, v in safetensors.torch.load_file(TEACHER).items()}
    assert 'notes' not in report(read_lora(save(tmp_path / 'own.safetensors', own)))  # has layers that FLUX has not


def test_the_teacher_bank_refuses_what_reading_refuses(tmp_path):
    from collectionlora.bases.pipeline import load_base
    from collectionlora.teachers import TeacherBank

    path = save(tmp_path / 'x.safetensors', safetensors.torch.load_file(TEACHER), {'ss_base_model_version': 'flux1'})
    with pytest.raises(UserError, match='ss_base_model_version.*another model'):
        TeacherBank(load_base(nano_dir()).backbone, {'x': path})


def test_a_trainer_with_a_known_fault_is_named(tmp_path):
    tool = {'software': json.dumps({'name': 'ai-toolkit'}), 'ss_base_model_version': 'qwen_image_edit'}
    for date, said in (('2026-02-11T10:00', True), ('2026-03-29', False)):
        path = save(tmp_path / f'{said}.safetensors', named(), tool | {'modelspec.date': date})
        assert any('swapped width and height' in n for n in read_lora(path).meta['notes']) == said


# ---- 6. what the file is

LOOKALIKES = {
    'git-lfs': (b'version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 295146184\n', 'git lfs pull'),
    'page': (b'\n<!DOCTYPE html>\n<html><title>Sign in</title></html>', 'web page'),
    'page with a BOM': (b'\xef\xbb\xbf<html></html>', 'web page'),
    'xml': (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', 'web page'),
    'error': (b'{"error": "Unauthorized"}', 'Unauthorized'),
    'config': (b'{"peft_type": "LORA", "r": 4}', 'config'),
    'index': (b'{"weight_map": {"a": "x-1", "b": "x-2"}}', '2 shards'),
    'text': (b'Repository not found\n', 'Repository not found'),
    'utf-16': ('Repository not found'.encode('utf-16'), 'Repository not found'),
    'empty': (b'', 'empty'),
    'pickle': (b'\x80\x02}q\x00.' + bytes(20), 'pickle'),
    'resource fork': (b'\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X' + bytes(60), 'resource fork'),
    'gzip': (b'\x1f\x8b\x08\x00' + bytes(20), 'gzip archive'),
    'seven': (b'7z\xbc\xaf\x27\x1c' + bytes(20), '7z archive'),
    'gguf': (b'GGUF' + bytes(40), 'GGUF'),
    'picture': (b'\x89PNG\r\n\x1a\n' + bytes(40), 'picture'),
    'cut off': (struct.pack('<Q', 900) + b'{"a":', 'truncated'),
    'cut zip': (b'PK\x03\x04' + bytes(60), 'cut off'),
}


@pytest.mark.parametrize('name', LOOKALIKES)
def test_a_lookalike_is_called_what_it_is(name, tmp_path):
    raw, words = LOOKALIKES[name]
    (tmp_path / 'x.safetensors').write_bytes(raw)
    for read in (read_lora, read_table, read_header):
        with pytest.raises(UserError, match=words) as e:
            read(tmp_path / 'x.safetensors')
        assert '\n' not in str(e.value)


def test_a_zip_is_no_pickle_and_a_pickle_in_a_zip_is_one(tmp_path):
    save(tmp_path / 'lora.safetensors', named())
    torch.save(named(), tmp_path / 'model.pt')
    for name in ('trained.zip', 'renamed.safetensors'):
        with zipfile.ZipFile(tmp_path / name, 'w') as z:
            z.write(tmp_path / 'lora.safetensors', 'out/lora.safetensors')
        with pytest.raises(UserError, match='zip archive.*out/lora.safetensors.*unpack') as e:
            read_lora(tmp_path / name)
        assert 'is a pickle' not in str(e.value)
    with pytest.raises(UserError, match='is a pickle'):
        read_lora(tmp_path / 'model.pt')


def test_shards_are_refused_as_such_the_folder_and_every_part(tmp_path):
    tensors = named('transformer.')
    keys = sorted(tensors)
    shards = [f'pytorch_lora_weights-0000{i + 1}-of-00002.safetensors' for i in (0, 1)]
    for i, shard in enumerate(shards):
        save(tmp_path / shard, {k: tensors[k] for k in keys[4 * i : 4 * i + 4]})
    index = tmp_path / 'pytorch_lora_weights.safetensors.index.json'
    index.write_text(json.dumps({'weight_map': {k: shards[i // 4] for i, k in enumerate(keys)}}))
    for path in (tmp_path, tmp_path / shards[0], index):
        with pytest.raises(UserError, match='shard.*save_file'):
            read_lora(path)
        with pytest.raises(UserError, match='shard'):
            convert(path, tmp_path / 'out.safetensors')
    (tmp_path / shards[0]).rename(tmp_path / 'a.safetensors')  # the index still knows a part by its name
    index.write_text(index.read_text().replace(shards[0], 'a.safetensors'))
    with pytest.raises(UserError, match='one of 2 shards'):
        read_lora(tmp_path / 'a.safetensors')
    assert not (tmp_path / 'out.safetensors').exists()
    (tmp_path / 'one').mkdir()
    assert len(read_lora(save(tmp_path / 'one' / 'x-00001-of-00001.safetensors', tensors)).factors) == 4


LAYOUTS = {
    'diffusers, older': dict(prefix='transformer.', a='lora.down', b='lora.up'),
    'torch.compile': dict(prefix='transformer._orig_mod.'),
    'torch.compile, bare': dict(prefix='_orig_mod.', a='lora_down', b='lora_up'),
    'wrapped twice': dict(prefix='transformer._orig_mod.module.'),
    'PEFT in diffusers': dict(prefix='transformer.base_model.model.'),
    'a numbered adapter': dict(prefix='transformer.', adapter='.default_0'),
    'ComfyUI, whole model': dict(prefix='model.diffusion_model.'),
}


@pytest.mark.parametrize('name', LAYOUTS)
@pytest.mark.parametrize('alpha', [None, 8.0])
def test_a_layout_that_is_exact_is_read(name, alpha, tmp_path):
    path = save(tmp_path / 'x.safetensors', named(**LAYOUTS[name], alpha=alpha))
    want = Lora({n: (a, b * (alpha or RANK) / RANK) for n, (a, b) in FACTORS.items()})
    assert lora_hash(read_lora(path)) == lora_hash(want)
    convert(path, tmp_path / 'c.safetensors')
    assert lora_hash(read_lora(tmp_path / 'c.safetensors')) == lora_hash(want)


def raw_file(path, head: bytes, payload: bytes):
    path.write_bytes(struct.pack('<Q', len(head)) + head + payload)
    return path


def parts(path):
    raw = Path(path).read_bytes()
    n = struct.unpack('<Q', raw[:8])[0]
    return json.loads(raw[8 : 8 + n]), raw[8 + n :]


def test_oddities_that_the_reference_library_reads_are_read(tmp_path):
    head, payload = parts(save(tmp_path / 'x.safetensors', named()))
    null = raw_file(tmp_path / 'null.safetensors', json.dumps({'__metadata__': None, **head}).encode(), payload)
    captions = {f'a picture of scene number {i} with "quotes": [and] {{braces}}, commas': 1 for i in range(40_000)}
    statistics = {'ss_tag_frequency': json.dumps({'1_x': captions})}
    big = save(tmp_path / 'big.safetensors', named(**KOHYA, alpha=RANK), statistics)
    assert read_table(big).start > 3_000_000
    for path in (null, big):
        assert safetensors.torch.load_file(path) and lora_hash(read_lora(path)) == lora_hash(Lora(FACTORS))
    save(tmp_path / 'huge.safetensors', named(), {'notes': 'x' * MAX_HEADER})
    with pytest.raises(UserError, match='metadata.*save_file') as e:
        read_lora(tmp_path / 'huge.safetensors')
    assert 'truncated' not in str(e.value)


def test_a_lora_that_changes_nothing_is_called_empty(tmp_path):
    tensors = {k: v * ('lora_A' in k) for k, v in named().items()}
    assert any('is empty' in n for n in report(read_lora(save(tmp_path / 'x.safetensors', tensors)))['notes'])


def test_lokr_with_a_lora_form_is_read_as_that_and_other_lokr_is_refused_truthfully(tmp_path):
    g, tensors, want = torch.Generator().manual_seed(1), {}, {}
    for i, n in enumerate(NAMES):
        w1, a, b = (torch.randn(*s, generator=g) for s in ((2, 2), (12, 3), (3, 16)))
        stem = f'diffusion_model.{n}'
        tensors |= {
            f'{stem}.lokr_w1': w1,
            f'{stem}.lokr_w2_a': a,
            f'{stem}.lokr_w2_b': b,
            f'{stem}.alpha': torch.tensor(6.0),
        }
        want[n] = torch.kron(w1, a @ b) * 2  # alpha / 3
    path = save(tmp_path / 'x.safetensors', tensors)
    got = read_lora(path)
    assert got.rank == 6 and all(torch.allclose(got.delta(n), want[n], atol=1e-4) for n in NAMES)
    convert(path, tmp_path / 'c.safetensors')
    again = read_lora(tmp_path / 'c.safetensors')
    assert all(torch.allclose(again.delta(n), want[n], atol=1e-4) for n in NAMES)
    full = {f'diffusion_model.{n}.lokr_{w}': torch.ones(4, 4) for n in NAMES for w in ('w1', 'w2')}
    with pytest.raises(UserError, match='LoKr of full rank.*as large as the layer'):
        read_lora(save(tmp_path / 'f.safetensors', full))
    with pytest.raises(UserError, match='needs either lokr_w2 or'):
        read_lora(save(tmp_path / 'h.safetensors', {k: v for k, v in tensors.items() if 'w2_b' not in k}))
    with pytest.raises(UserError, match='LoHa'):
        read_lora(save(tmp_path / 'l.safetensors', {f'diffusion_model.{NAMES[0]}.hada_w1_a': torch.ones(2, 2)}))


# ---- headers that other programs rewrote

EFFECTS = {'collectionlora.effects': [dict(id='a', category='animal', trigger='bekuz')]}


def signed(tmp_path):
    write_lora(tmp_path / 's.safetensors', Lora(FACTORS), EFFECTS | {'collectionlora.sampling': {'times': [1.0]}})
    with safetensors.safe_open(tmp_path / 's.safetensors', 'pt') as f:
        return safetensors.torch.load_file(tmp_path / 's.safetensors'), f.metadata()


def musubi(tensors):
    "Names and alphas as its converter writes them; the numbers stay."
    out = {}
    for key, t in tensors.items():
        body, _, part = key.removeprefix('diffusion_model.').partition('.lora_')
        flat = 'lora_unet_' + body.replace('.', '_')
        out |= {f'{flat}.lora_{"down" if part[0] == "A" else "up"}.weight': t, f'{flat}.alpha': torch.tensor(RANK)}
    return out


REWRITTEN = {
    'a field more': lambda t, m: (t, m | {'modelspec.author': 'me', 'modelspec.hash_sha256': '0x12'}),
    'a field less': lambda t, m: (t, {k: v for k, v in m.items() if k != 'modelspec.architecture'}),
    'another catalogue': lambda t, m: (
        t,
        m | {'collectionlora.effects': m['collectionlora.effects'].replace('bekuz', 'zon')},
    ),
    'no header checksum': lambda t, m: (t, {k: v for k, v in m.items() if 'header_sha256' not in k}),
    'no checksums': lambda t, m: (t, {k: v for k, v in m.items() if 'sha256' not in k}),
    'other names': lambda t, m: ({k.replace('diffusion_model', 'transformer'): v for k, v in t.items()}, m),
    'musubi': lambda t, m: (musubi(t), m),
}


@pytest.mark.parametrize('name', REWRITTEN)
def test_a_header_that_another_program_rewrote_is_said_and_the_weights_are_checked(name, tmp_path, caplog):
    path = save(tmp_path / 'r.safetensors', *REWRITTEN[name](*signed(tmp_path)))
    got = read_lora(path)
    assert lora_hash(got) == lora_hash(Lora(FACTORS)) and got.meta['scales'][NAMES[0]] == 1
    assert any('effects, prompts and sampling cannot be trusted' in n for n in report(got)['notes'])
    assert 'cannot be trusted' in caplog.text and str(path) in caplog.text
    convert(path, tmp_path / 'c.safetensors')
    assert (
        lora_hash(read_lora(tmp_path / 'c.safetensors')) == lora_hash(got)
        and verify(tmp_path / 'c.safetensors') is None
    )


def exchanged(tensors):
    return {k.replace('to_q', 'to_x').replace('to_k', 'to_q').replace('to_x', 'to_k'): v for k, v in tensors.items()}


DAMAGED = {
    'a weight': lambda t, m: (t | {next(iter(t)): next(iter(t.values())) + 1}, m),
    'a weight and a field': lambda t, m: (
        t | {next(iter(t)): next(iter(t.values())) + 1},
        m | {'modelspec.author': 'me'},
    ),
    'two layers exchanged': lambda t, m: (exchanged(t), m),
    'musubi, other numbers': lambda t, m: ({k: v * 2 if 'down' in k else v for k, v in musubi(t).items()}, m),
    'musubi, layers exchanged': lambda t, m: (exchanged(musubi(t)), m),
}


@pytest.mark.parametrize('name', DAMAGED)
def test_weights_that_are_not_the_signed_ones_are_refused_with_a_way_out(name, tmp_path):
    path = save(tmp_path / 'r.safetensors', *DAMAGED[name](*signed(tmp_path)))
    with pytest.raises(UserError, match='do not match the checksum.*save them without the collectionlora'):
        read_lora(path)


def test_two_tensors_of_one_file_exchanged_in_the_header_alone_are_noticed(tmp_path):
    signed(tmp_path)
    head, payload = parts(tmp_path / 's.safetensors')
    a, b = (f'diffusion_model.{n}.lora_A.weight' for n in NAMES[:2])
    head[a]['data_offsets'], head[b]['data_offsets'] = head[b]['data_offsets'], head[a]['data_offsets']
    with pytest.raises(UserError, match='do not match'):
        read_lora(raw_file(tmp_path / 'x.safetensors', json.dumps(head).encode(), payload))


def command(*args):
    bin = Path(sys.executable).with_name('collectionlora')
    done = subprocess.run([bin, *map(str, args)], capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def test_the_command_line_reads_a_rewritten_file_and_takes_alpha(tmp_path):
    rewritten = save(tmp_path / 'r.safetensors', *REWRITTEN['a field more'](*signed(tmp_path)))
    code, out, err = command('inspect', rewritten, '--json')
    assert code == 0 and 'cannot be trusted' in err and 'cannot be trusted' in json.loads(out)['report']['notes'][0]
    unclear = save(tmp_path / 'u.safetensors', named(), {'lora_alpha': '8', 'network_alpha': '4'})
    code, out, err = command('convert', unclear, tmp_path / 'c.safetensors')
    assert code == 2 and '--alpha' in err and 'Traceback' not in err
    assert command('convert', unclear, tmp_path / 'c.safetensors', '--alpha', 8)[0] == 0
    folded = Lora({n: (a, 4 * b) for n, (a, b) in FACTORS.items()})
    assert lora_hash(read_lora(tmp_path / 'c.safetensors')) == lora_hash(folded)


# ---- folders of pictures

SEPARATORS = '\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e'


def general(folder, raw: bytes, picture='0.png'):
    (folder / 'images').mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (64, 64), (9, 9, 9)).save(folder / 'images' / picture)
    (folder / 'manifest.jsonl').write_bytes(raw)
    return folder


@pytest.mark.parametrize('sign', SEPARATORS, ids=lambda c: f'{ord(c):04x}')
def test_a_line_of_json_ends_at_a_line_feed_only(sign, tmp_path):
    escaped = ord(sign) < 32  # JSON wants control characters escaped; the others may stand as they are
    lines = [json.dumps({'image': 'images/0.png', 'prompt': f'to{sign}{i}'}, ensure_ascii=escaped) for i in range(2)]
    folder = general(tmp_path, '\r\n'.join(lines).encode())
    assert [c for _, c in load_general(folder)] == [f'to{sign}{i}' for i in range(2)]


@pytest.mark.parametrize('code', ['cp1252', 'utf-16', 'utf-16-le', 'shift-jis'])
def test_a_manifest_that_is_not_utf8_is_one_sentence(code, tmp_path):
    text = '{"image": "images/0.png", "prompt": "' + ('夜' if code == 'shift-jis' else 'café') + '"}\n'
    with pytest.raises(UserError, match='manifest.jsonl.*(UTF-8|JSON)'):
        load_general(general(tmp_path, text.encode(code)))


def test_a_byte_order_mark_is_no_part_of_a_manifest(tmp_path):
    line = '{"image": "images/0.png", "prompt": "a café at night"}\n'
    assert load_general(general(tmp_path, line.encode('utf-8-sig')))[0][1] == 'a café at night'


@pytest.mark.parametrize('forms', [('NFD', 'NFC'), ('NFC', 'NFD'), ('NFD', 'NFD')])
def test_names_are_compared_in_one_unicode_form(forms, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype='u1')
    effect = write_effect(
        tmp_path / 'e', id='a', category='animal', prompt='p', pairs=[(pixels, pixels)], specs=[{'x': 1}]
    )
    for sub, form in zip(('source', 'target', 'spec'), (*forms, 'NFC')):
        (file,) = (effect.folder / sub).iterdir()
        file.rename(file.with_name(unicodedata.normalize(form, 'café') + file.suffix))
    found = load_effect(effect.folder)
    assert found.stems == ('café',) and len(found.targets) == 1 and found.specs[0].is_file()
    picture, asked = (unicodedata.normalize(f, 'café.png') for f in forms)
    manifest = json.dumps({'image': f'images/{asked}', 'prompt': 'p'}).encode()
    ((path, _),) = load_general(general(tmp_path / 'g', manifest, picture))
    assert path.is_file()


def test_upper_case_endings_and_hidden_files_of_macos_in_folders_of_loras(tmp_path):
    from collectionlora.teachers import teacher_files

    save(tmp_path / 'Candy.SAFETENSORS', named())
    for name in ('._Candy.SAFETENSORS', '._adapter_config.json', '.DS_Store'):
        (tmp_path / name).write_bytes(b'\x00\x05\x16\x07\x00\x02\x00\x00' + bytes(80))
    assert find_weights(tmp_path)[0].name == 'Candy.SAFETENSORS'
    assert list(teacher_files([tmp_path])) == ['Candy']
    (tmp_path / 'adapter_config.json').write_text(PEFT)
    assert scale_of(tmp_path / 'Candy.SAFETENSORS') == 4  # the one LoRA of the folder


def test_one_name_in_two_forms_is_no_pair_of_names(tmp_path):
    pixels = np.zeros((64, 64, 3), 'u1')
    effect = write_effect(tmp_path / 'e', id='a', category='animal', prompt='p', pairs=[(pixels, pixels)])
    for form in ('NFC', 'NFD'):
        Image.fromarray(pixels).save(effect.folder / 'source' / unicodedata.normalize(form, 'é.png'))
    with pytest.raises(UserError, match='same stem'):
        load_effect(effect.folder)


# ---- whatever arrives

few = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@few
@given(st.binary(max_size=200), st.booleans())
@example(b'PK\x03\x04', False)
@example(b'\xff\xfe', False)
@example(b'{', True)
def test_any_bytes_are_refused_in_one_line(tmp_path, raw, counted):
    path = tmp_path / 'x.safetensors'
    path.write_bytes(struct.pack('<Q', len(raw)) + raw if counted else raw)
    try:
        read_lora(path)
    except UserError as e:
        assert '\n' not in str(e) and str(path) in str(e)
    else:
        raise AssertionError('rubbish was read')
    assert '\n' not in what_it_is(path)


words = st.text(alphabet=st.characters(exclude_categories=('Cs',)), max_size=12)
keys = st.one_of(
    st.sampled_from(
        ['lora_alpha', 'alpha', 'rank', 'ss_network_alpha', 'config', 'use_rslora', 'alpha_pattern', 'base_model']
    ),
    words,
)
values = st.recursive(
    st.one_of(words, st.integers(-99, 99).map(str), st.floats().map(str), st.none(), st.booleans(), st.floats(-9, 9)),
    lambda inner: st.dictionaries(keys, inner, max_size=3) | st.lists(inner, max_size=3),
    max_leaves=6,
)


@few
@given(st.dictionaries(keys, values.map(lambda v: v if isinstance(v, str) else json.dumps(v)), max_size=4))
def test_any_header_is_read_with_the_strength_that_it_names_or_refused(tmp_path, metadata):
    path = tmp_path / 'x.safetensors'
    path.unlink(missing_ok=True)
    safetensors.torch.save_file(named(), path, metadata)
    try:
        scale = report(read_lora(path))['scale']
    except UserError:
        return
    top = [float(metadata[k]) for k in ('lora_alpha', 'alpha') if k in metadata and is_decimal(metadata[k])]
    assert all(abs(s - alpha / RANK) < 1e-4 or 'rslora' in str(metadata) for alpha in top for s in scale)


def is_decimal(text):
    try:
        return abs(float(text)) < 1e9 and text.strip().isascii()
    except ValueError:
        return False


@few
@given(st.text(min_size=1, max_size=30, alphabet=st.characters(exclude_categories=('Cs',), exclude_characters='/\0')))
def test_a_config_or_lora_of_any_name_is_found(tmp_path, name):
    folder = tmp_path / 'f'
    for old in folder.glob('**/*') if folder.exists() else ():
        if old.is_file():
            old.unlink()
    if len(f'{name}.safetensors'.encode()) > 250 or name in ('.', '..') or name.startswith('.'):
        return
    path = save(folder / f'{name}.safetensors', named())
    (folder / 'adapter_config.json').write_text(PEFT)
    assert find_weights(folder)[0] == path and len(configs_beside(path)[0]) == 1 and scale_of(path) == 4


def test_earlier_names_of_modules_lead_to_the_functions():
    from collectionlora.data import load_effect as earlier_effect
    from collectionlora.lora_files import read_lora as earlier_read
    from collectionlora.lora_header import catalogue as earlier_catalogue

    assert (earlier_effect, earlier_read, earlier_catalogue) == (load_effect, read_lora, catalogue)
    with pytest.raises(ImportError):
        from collectionlora.data import no_such_function  # noqa: F401
