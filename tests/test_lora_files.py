"""LoRA files against the programs that write and read them: real PEFT and diffusers files, outputs compared, and every refusal by name."""

import json
import logging
import shutil
import struct
import subprocess
import sys

import diffusers as installed
import pytest
import safetensors.torch
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.loaders.lora_pipeline import QwenImageLoraLoaderMixin
from peft import get_peft_model, LoraConfig

from collectionlora.core import data_dir, read_json, UserError
from collectionlora.files.clients import comfyui_view, diffsynth_view
from collectionlora.files.dialects import Lora, lora_hash
from collectionlora.files.header import catalogue, file_sha256, read_header, read_table
from collectionlora.files.lora import annotate, convert, DIALECTS, find_weights, read_lora, report, write_lora
from collectionlora.files.shrink import resize, shrink

logging.getLogger('diffusers').setLevel(logging.CRITICAL)
RANK, DIFFUSERS = 4, tuple(map(int, installed.__version__.split('.')[:2]))


def tiny(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            guidance_embeds=False,
            axes_dims_rope=(4, 6, 6),
        ).eval()


class Pipe(QwenImageLoraLoaderMixin):
    hf_device_map = None

    def __init__(self, transformer):
        self.transformer = transformer

    @property
    def components(self):
        return {'transformer': self.transformer}


@torch.no_grad()
def output(model):
    g = torch.Generator().manual_seed(1)
    return model(
        hidden_states=torch.randn(1, 16, 16, generator=g),
        encoder_hidden_states=torch.randn(1, 5, 32, generator=g),
        encoder_hidden_states_mask=torch.ones(1, 5, dtype=torch.bool),
        timestep=torch.tensor([0.5]),
        img_shapes=[[(1, 4, 4)]],
        return_dict=False,
    )[0]


def changed(factors):
    model = tiny()
    for n, (a, b) in factors.items():
        model.get_submodule(n).weight.data += b.float() @ a.float()
    return output(model)


MODEL = tiny()
PLAIN = output(MODEL)
MODULES = {
    n: (m.in_features, m.out_features)
    for n, m in MODEL.named_modules()
    if isinstance(m, torch.nn.Linear) and n.startswith('transformer_blocks')
}
_g = torch.Generator().manual_seed(2)
LORA = Lora(
    {
        n: (torch.randn(RANK, i, generator=_g) * 0.2, torch.randn(o, RANK, generator=_g) * 0.2)
        for n, (i, o) in MODULES.items()
    }
)
TRUTH = changed(LORA.factors)


def close(y, to=TRUTH):
    return float((y - to).abs().max()) < 2e-5


def through_diffusers(path):
    model = tiny()
    Pipe(model).load_lora_weights(str(path.parent), weight_name=path.name, adapter_name='x')
    return output(model)


def save(path, tensors, metadata=None):
    safetensors.torch.save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path, metadata=metadata)
    return path


def tensors_of(prefix='diffusion_model.', a='lora_A', b='lora_B', adapter='', alpha=None, flat=False):
    "The reference table's rows, written out independently of the code under test."
    out = {}
    for n, (fa, fb) in LORA.factors.items():
        stem = prefix + (n.replace('.', '_') if flat else n)
        out[f'{stem}.{a}{adapter}.weight'] = fa
        out[f'{stem}.{b}{adapter}.weight'] = fb if alpha is None else fb * (RANK / alpha)
        if alpha is not None:
            out[f'{stem}.alpha'] = torch.tensor(float(alpha))
    return out


DOWN = dict(a='lora_down', b='lora_up')
# row -> (tensors, ours, diffusers, ComfyUI, DiffSynth); True right, False silently ignored, 'scale' of a wrong strength, 'error' refused by the program
MATRIX = {
    'diffusion_model': (dict(), True, True, True, True),
    'diffusion_model alpha': (dict(alpha=8), True, True if DIFFUSERS >= (0, 42) else 'scale', True, True),
    'diffusion_model down/up alpha': (dict(alpha=2, **DOWN), True, True, True, True),
    'transformer': (dict(prefix='transformer.'), True, True, True, False),
    'transformer alpha': (dict(prefix='transformer.', alpha=8), True, 'error', True, False),
    'transformer default': (dict(prefix='transformer.', adapter='.default'), True, 'error', True, False),
    'bare': (dict(prefix=''), True, False, True, True),
    'bare default (DiffSynth)': (dict(prefix='', adapter='.default'), True, True, True, True),
    'kohya': (dict(prefix='lora_unet_', flat=True, alpha=1, **DOWN), True, True, True, False),
    'kohya without alpha': (dict(prefix='lora_unet_', flat=True, **DOWN), True, None, True, False),
    'Lightning': (dict(prefix='', alpha=8, **DOWN), True, True, True, True),
    'down/up without alpha': (dict(prefix='', **DOWN), True, False, True, True),
    'lycoris': (dict(prefix='lycoris_', flat=True, alpha=8, **DOWN), True, 'error', True, False),
    'OneTrainer': (dict(prefix='lora_transformer_', flat=True, alpha=8, **DOWN), True, 'error', False, False),
}


@pytest.mark.parametrize('row', MATRIX)
def test_golden_matrix(row, tmp_path):
    kw, ours, diffusers, comfy, diffsynth = MATRIX[row]
    tensors = tensors_of(**kw)
    path = save(tmp_path / 'x.safetensors', tensors)
    got = read_lora(path, MODULES)
    assert close(changed(got.factors)) and len(got.factors) == 28 and report(got)['modules'] == 28
    for view, want in ((comfyui_view, comfy), (diffsynth_view, diffsynth)):
        seen = view(tensors, MODULES)
        assert (len(seen) == 28 and close(changed(seen))) if want else not seen
    if diffusers == 'error':
        with pytest.raises(Exception):
            through_diffusers(path)
    elif diffusers == 'scale':
        assert not close(seen := through_diffusers(path)) and not close(seen, PLAIN)
    elif diffusers is not None:
        assert close(through_diffusers(path), TRUTH if diffusers else PLAIN)
    # whatever came in, what goes out is right everywhere
    convert(path, tmp_path / 'c.safetensors', modules=MODULES)
    out = safetensors.torch.load_file(tmp_path / 'c.safetensors')
    assert close(through_diffusers(tmp_path / 'c.safetensors'))
    assert close(changed(comfyui_view(out, MODULES))) and close(changed(diffsynth_view(out, MODULES)))
    assert not any('alpha' in k for k in out) and 'lora_adapter_metadata' not in read_header(tmp_path / 'c.safetensors')


CONFIGS = {
    'alpha 2r': dict(r=4, lora_alpha=8),
    'rsLoRA': dict(r=4, lora_alpha=16, use_rslora=True),
    'patterns': dict(
        r=4, lora_alpha=4, rank_pattern={'to_q': 2, 'img_mlp.net.2': 3}, alpha_pattern={'to_k': 1, 'img_mlp.net.2': 6}
    ),
    'rsLoRA and patterns': dict(
        r=4, lora_alpha=3, use_rslora=True, rank_pattern={'attn.to_v': 2}, alpha_pattern={'to_q': 7}
    ),
}
TARGETS = ['to_q', 'to_k', 'to_v', 'img_mlp.net.2', 'img_mod.1']


def peft_model(config):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return get_peft_model(tiny(), LoraConfig(target_modules=TARGETS, init_lora_weights=False, **config)).eval()


@pytest.mark.parametrize('name', CONFIGS)
def test_real_peft_folder(name, tmp_path):
    model = peft_model(CONFIGS[name])
    model.save_pretrained(tmp_path)
    got = read_lora(tmp_path, MODULES, allow_missing=True)
    assert close(changed(got.factors), output(model)) and got.meta['producer'] == 'PEFT save_pretrained'
    (tmp_path / 'adapter_config.json').unlink()
    with pytest.raises(UserError, match='adapter_config.json'):
        read_lora(tmp_path, MODULES, allow_missing=True)


@pytest.mark.parametrize('name', CONFIGS)
@pytest.mark.parametrize('how', ['save_lora_weights', 'save_lora_adapter'])
def test_real_diffusers_file(how, name, tmp_path):
    from peft.utils import get_peft_model_state_dict

    model = tiny()
    with torch.random.fork_rng():
        torch.manual_seed(6)
        model.add_adapter(
            LoraConfig(target_modules=TARGETS, init_lora_weights=False, **CONFIGS[name]), adapter_name='default'
        )
    if how == 'save_lora_adapter':
        model.save_lora_adapter(tmp_path)
    else:
        QwenImageLoraLoaderMixin.save_lora_weights(
            tmp_path,
            transformer_lora_layers=get_peft_model_state_dict(model),
            transformer_lora_adapter_metadata=model.peft_config['default'].to_dict(),
        )
    got = read_lora(tmp_path, MODULES, allow_missing=True)
    assert close(changed(got.factors), output(model)) and got.meta['alpha'] == 'lora_adapter_metadata'


def test_peft_reads_our_folder(tmp_path):
    from peft import PeftModel

    mixed = resize(LORA, energy=0.7)
    assert len(report(mixed)['ranks']) > 1
    write_lora(tmp_path / 'm.safetensors', mixed)
    convert(tmp_path / 'm.safetensors', tmp_path / 'peft', 'peft')
    assert close(output(PeftModel.from_pretrained(tiny(), tmp_path / 'peft').eval()), changed(mixed.factors))
    assert lora_hash(read_lora(tmp_path / 'peft')) == lora_hash(mixed)


def test_a_smaller_file_has_one_rank_because_old_diffusers_scale_mixed_ones_wrongly(tmp_path):
    whole = write_lora(
        tmp_path / 'm.safetensors',
        LORA,
        {'collectionlora.effects': [dict(id='a', trigger='b', category='c')]},
        torch.bfloat16,
    )
    for mixed in (False, True):
        path = tmp_path / f'{mixed}.safetensors'
        small = shrink(tmp_path / 'm.safetensors', path, energy=0.7, mixed=mixed)
        assert (
            (len(report(small)['ranks']) > 1) == mixed
            and catalogue(path)[0]['id'] == 'a'
            and read_table(path).tensors.popitem()[1].dtype == 'BF16'
        )
        want, tensors = changed(read_lora(path).factors), safetensors.torch.load_file(path)
        assert close(changed(comfyui_view(tensors, MODULES)), want) and close(
            changed(diffsynth_view(tensors, MODULES)), want
        )
        assert close(through_diffusers(path), want) == (not mixed or DIFFUSERS >= (0, 40))
        (parent,) = read_header(path)['collectionlora.parents']
        assert parent['sha256'] == whole and parent['energy'] == 0.7 <= parent['energy_kept'] < 1
    shrink(tmp_path / 'm.safetensors', path, rank=RANK - 1, dtype=torch.float32)
    assert read_header(path)['ss_network_dim'] == '3' and read_lora(path).rank == 3
    for kw in (dict(), dict(rank=0), dict(energy=1.2), dict(energy=0.0), dict(rank=2, energy=0.5)):
        with pytest.raises(UserError, match='rank of at least 1 or an energy'):
            shrink(tmp_path / 'm.safetensors', path, **kw)


def test_a_catalogue_is_completed_afterwards(tmp_path):
    path = tmp_path / 'c.safetensors'
    before = write_lora(
        path,
        LORA,
        {'collectionlora.effects': [dict(id='a', trigger='b', category='c'), dict(id='d', trigger='e', category='c')]},
        torch.bfloat16,
    )
    payload = read_header(path)['collectionlora.payload_sha256']
    after = annotate(path, {'d': {'metrics': {'bcr': 0.25}, 'example_seed': 3}})
    assert after == file_sha256(path) != before and read_header(path)['collectionlora.payload_sha256'] == payload
    assert catalogue(path) == [
        dict(id='a', trigger='b', category='c'),
        dict(id='d', trigger='e', category='c', metrics={'bcr': 0.25}, example_seed=3),
    ]
    assert annotate(path, {'d': {'metrics': {'bcr': 0.25}}}) == after
    for fields, match in (
        ({'f': {}}, "unknown key 'f'"),
        ({'a': {'metrics': {'bcr': 'low'}}}, 'metrics'),
        ({'a': {'thumbnail': 'x' * 1_000_000}}, 'thumbnails'),
    ):
        with pytest.raises(UserError, match=match):
            annotate(path, fields)
        assert file_sha256(path) == after and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('dialect', DIALECTS)
@pytest.mark.parametrize('alpha', [None, 1.0, 8.0])
def test_every_conversion_comes_back_exactly(dialect, alpha, tmp_path):
    write_lora(tmp_path / 'a.safetensors', LORA)
    out = tmp_path / ('out' if dialect == 'peft' else 'out.safetensors')
    convert(tmp_path / 'a.safetensors', out, dialect, out_alpha=alpha)
    assert lora_hash(read_lora(out, MODULES)) == lora_hash(LORA)


def test_official_release_layout(tmp_path):
    tensors = tensors_of(prefix='model.base_model.model.', adapter='.default')
    torch.save({'generator': tensors}, tmp_path / 'model.pt')
    for path in (tmp_path, tmp_path / 'model.pt', shutil.copy(tmp_path / 'model.pt', tmp_path / 'renamed.safetensors')):
        with pytest.raises(UserError, match='pickle.*weights_only=True'):
            read_lora(path)
    (tmp_path / 'renamed.safetensors').unlink()
    path = save(tmp_path / 'w.safetensors', tensors)
    with pytest.raises(UserError, match='adapter_config.json'):
        read_lora(path, MODULES)
    (tmp_path / 'lora_config').mkdir()
    (tmp_path / 'lora_config' / 'adapter_config.json').write_text(json.dumps(dict(r=4, lora_alpha=2)))
    half = changed({n: (a, b / 2) for n, (a, b) in LORA.factors.items()})
    assert close(changed(read_lora(path, MODULES).factors), half)


def test_two_exports_are_one_file(tmp_path):
    header = {
        'collectionlora.effects': [dict(id=f'e{i}', trigger=f't{i}', category='animal') for i in range(5)],
        'modelspec.title': 'x',
    }
    backwards = Lora(dict(reversed(LORA.factors.items())))
    sums = {
        write_lora(tmp_path / f'{i}.safetensors', lora, dict(reversed(header.items())) if i else header)
        for i, lora in enumerate((LORA, backwards))
    }
    assert len(sums) == 1 and sums == {file_sha256(tmp_path / '0.safetensors')}
    assert [e['id'] for e in catalogue(tmp_path / '0.safetensors')] == [f'e{i}' for i in range(5)]


def test_bfloat16_conversion_is_exact(tmp_path):
    half = {
        k: v.to(torch.bfloat16) if k.endswith('weight') else v
        for k, v in tensors_of(prefix='', alpha=8, **DOWN).items()
    }
    path = save(tmp_path / 'x.safetensors', half)
    convert(path, tmp_path / 'c.safetensors')
    assert {e.dtype for e in read_table(tmp_path / 'c.safetensors').tensors.values()} == {'BF16'}
    assert lora_hash(read_lora(tmp_path / 'c.safetensors')) == lora_hash(read_lora(path))


def refusal(tmp_path, change, match, metadata=None, **kw):
    tensors = dict(tensors_of())
    change(tensors)
    with pytest.raises(UserError, match=match) as e:
        read_lora(save(tmp_path / 'x.safetensors', tensors, metadata), MODULES, **kw)
    assert str(tmp_path / 'x.safetensors') in str(e.value)


N = 'diffusion_model.transformer_blocks.1.attn.to_k'
A, B = f'{N}.lora_A.weight', f'{N}.lora_B.weight'
REFUSALS = {
    'nan': (lambda t: t.update({A: t[A] * float('nan')}), 'NaN'),
    'one inf': (
        lambda t: t.update({B: t[B].index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(float('-inf')))}),
        'infinite',
    ),
    'missing module': (lambda t: (t.pop(A), t.pop(B)), '27 of 28 modules'),
    'missing factor': (lambda t: t.pop(B), 'no factor B'),
    'unknown module': (lambda t: t.update({A.replace('to_k', 'to_kk'): t.pop(A)}), 'did you mean'),
    'other block': (
        lambda t: t.update({A.replace('.1.', '.7.'): t[A], B.replace('.1.', '.7.'): t[B]}),
        'does not exist',
    ),
    'flux': (lambda t: t.update({'diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight': t[A]}), 'FLUX'),
    'text encoder': (lambda t: t.update({'text_encoder.layers.0.q_proj.lora_A.weight': t[A]}), 'text encoder'),
    'wrong input': (lambda t: t.update({A: t[A][:, :-1]}), 'do not fit'),
    'rank mismatch': (lambda t: t.update({A: t[A][:-1]}), 'do not fit'),
    'swapped factors': (lambda t: t.update({A: t[B], B: t[A]}), 'do not fit'),
    'conv': (lambda t: t.update({A: t[A][:, :, None, None]}), 'two non-zero sizes'),
    'integers': (lambda t: t.update({A: t[A].to(torch.int8)}), 'quantised or integer'),
    'fp8': (lambda t: t.update({A: t[A].to(torch.float8_e4m3fn)}), 'quantised or integer'),
    'extra tensor': (lambda t: t.update({'emp': torch.ones(2)}), 'not a LoRA factor'),
    'dora': (lambda t: t.update({f'{N}.dora_scale': torch.ones(2)}), 'DoRA'),
    'loha': (lambda t: t.update({f'{N}.hada_w1_a': torch.ones(2)}), 'LoHa'),
    'full difference': (lambda t: t.update({f'{N}.diff_b': torch.ones(2)}), 'full difference'),
    'bias': (lambda t: t.update({f'{N}.lora_B.bias': torch.ones(2)}), 'bias'),
    'two adapters': (
        lambda t: t.update({A.replace('A.w', 'A.fx.w'): t.pop(A), B.replace('B.w', 'B.fx.w'): t.pop(B)}),
        'ambiguous',
    ),
    'two dialects': (
        lambda t: t.update(
            {A.removeprefix('diffusion_model.'): t.pop(A), B.removeprefix('diffusion_model.'): t.pop(B)}
        ),
        'key prefixes',
    ),
    'same twice': (lambda t: t.update({A.removeprefix('diffusion_model.'): t[A]}), 'both A of one module'),
    'one alpha': (lambda t: t.update({f'{N}.alpha': torch.tensor(4.0)}), '1 of 28'),
    'no lora': (lambda t: t.clear(), 'no LoRA tensor'),
}


@pytest.mark.parametrize('case', REFUSALS)
def test_refused_with_the_reason(case, tmp_path):
    refusal(tmp_path, *REFUSALS[case])


@pytest.mark.parametrize(
    'alpha, match', [(0.0, 'not zero'), (float('nan'), 'finite'), (float('inf'), 'finite'), ([1.0, 2.0], 'one number')]
)
def test_bad_alpha(alpha, match, tmp_path):
    def change(t):
        for n in MODULES:
            t[f'diffusion_model.{n}.alpha'] = torch.tensor(alpha)

    refusal(tmp_path, change, match)


META = (
    {'use_dora': True},
    {'init_lora_weights': 'pissa_niter_4'},
    {'lora_bias': True},
    {'bias': 'all'},
    {'r': 5},
    {'lora_alpha': 'many'},
    {'alpha_pattern': {'(a+)+$': 2}},
    {'alpha_pattern': {'to_q': 'x'}},
    {'peft_type': 'LOHA'},
    {'lora_alpha': 10**400},
)


@pytest.mark.parametrize('fields', META, ids=lambda f: next(iter(f)))
def test_bad_diffusers_metadata(fields, tmp_path):
    config = {f'transformer.{k}': v for k, v in (dict(r=4, lora_alpha=8) | fields).items()}
    refusal(tmp_path, lambda t: None, '.', {'lora_adapter_metadata': json.dumps(config)})


def test_metadata_and_alpha_must_agree(tmp_path):
    meta = lambda a: {'lora_adapter_metadata': json.dumps({'transformer.r': 4, 'transformer.lora_alpha': a})}
    tensors = tensors_of(alpha=8)
    assert close(changed(read_lora(save(tmp_path / 'a.safetensors', tensors, meta(8)), MODULES).factors))
    with pytest.raises(UserError, match='different scales'):
        read_lora(save(tmp_path / 'b.safetensors', tensors, meta(4)), MODULES)


def test_other_base(tmp_path):
    write_lora(tmp_path / 'x.safetensors', LORA, {'collectionlora.base': {'hash': 'a' * 64, 'id': 'nano'}})
    read_lora(tmp_path / 'x.safetensors', base='a' * 64)
    with pytest.raises(UserError, match='for the base nano aaaaaaaaaaaa, the base in use is bbbbbbbbbbbb'):
        read_lora(tmp_path / 'x.safetensors', base='b' * 64)
    refusal(tmp_path, lambda t: None, 'another model', {'modelspec.architecture': 'flux-1-dev/lora'})


def test_missing_modules_need_permission(tmp_path):
    some = Lora({n: f for n, f in LORA.factors.items() if '_mod.' not in n})
    write_lora(tmp_path / 'x.safetensors', some)
    with pytest.raises(UserError, match=r'24 of 28.*\*\.img_mod\.1'):
        read_lora(tmp_path / 'x.safetensors', MODULES)
    with pytest.raises(UserError, match='list of patterns'):
        read_lora(tmp_path / 'x.safetensors', MODULES, allow_missing='*_mod.1')
    assert len(read_lora(tmp_path / 'x.safetensors', MODULES, allow_missing=['*_mod.1']).meta['missing']) == 4


def test_writer_refuses(tmp_path):
    path, n = tmp_path / 'x.safetensors', next(iter(MODULES))
    a, b = LORA.factors[n]
    for lora, header, match in (
        (Lora({}), {}, 'empty'),
        (Lora({n: (a, b * float('nan'))}), {}, 'NaN'),
        (Lora({n: (a, b[:, :-1])}), {}, 'shape'),
        (LORA, {'collectionlora.effect': []}, 'effects'),
        (LORA, {'lora_adapter_metadata': '{}'}, 'must not be written'),
        (LORA, {'modelspec.description': 'x' * 1_000_001}, '1000000'),
    ):
        with pytest.raises(UserError, match=match):
            write_lora(path, lora, header)
        assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match='infinite'):  # finite in float32, not in bfloat16
        write_lora(path, Lora({n: (a, torch.full_like(b, 3.4e38))}), dtype=torch.bfloat16)


def damage(path, at, to):
    raw = bytearray(path.read_bytes())
    raw[at : at + len(to)] = to
    path.write_bytes(raw)


def test_every_changed_byte_of_a_signed_file_is_noticed(tmp_path):
    n = next(iter(MODULES))
    write_lora(
        tmp_path / 'x.safetensors',
        Lora({n: LORA.factors[n]}),
        {'collectionlora.effects': [dict(id='a', trigger='b', category='c')]},
    )
    good = (tmp_path / 'x.safetensors').read_bytes()
    start = read_table(tmp_path / 'x.safetensors').start
    for at in list(range(0, start, 7)) + list(range(start, len(good), 101)):
        (tmp_path / 'y.safetensors').write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        try:
            got = read_lora(tmp_path / 'y.safetensors')
        except UserError:
            continue
        assert at < start and lora_hash(got) == lora_hash(read_lora(tmp_path / 'x.safetensors')), at
        # a changed header is said; only the white space between header and payload carries no meaning
        assert good[at : at + 1] == b' ' or any('cannot be trusted' in n for n in got.meta['notes']), at


@pytest.mark.parametrize(
    'raw',
    [
        b'',
        b'abc',
        b'\x00' * 8,
        struct.pack('<Q', 1 << 40) + b'{}',
        struct.pack('<Q', 2) + b'{}x',
        struct.pack('<Q', 2) + b'[]',
        struct.pack('<Q', 3) + b'{"a',
        struct.pack('<Q', 4 << 20) + b'[' * (4 << 20),
        struct.pack('<Q', 30) + b'{"__metadata__":{"a":1e99999}}'[:30],
        struct.pack('<Q', 26) + b'{"__metadata__":{"a":"\xff"}}',
        struct.pack('<Q', 6) + b'\xff\xfe{\x00}\x00',
    ],
)
def test_rubbish_is_refused(raw, tmp_path):
    (tmp_path / 'x.safetensors').write_bytes(raw)
    for read in (read_lora, read_table) + (
        () if raw.endswith(b'{}x') else (read_header,)
    ):  # listing does not look at the payload
        with pytest.raises(UserError):
            read(tmp_path / 'x.safetensors')


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / 'no.safetensors', tmp_path):
        with pytest.raises(UserError):
            read_lora(path)
    assert find_weights(tmp_path / 'a.safetensors')[1] is None


def test_newer_minor_version_is_read_and_newer_major_is_not(tmp_path):
    path = tmp_path / 'x.safetensors'
    write_lora(
        path,
        LORA,
        {
            'collectionlora.schema': '1.7',
            'collectionlora.effects': [dict(id='a', trigger='b', category='c', shiny=True)],
        },
    )
    assert catalogue(path)[0]['shiny'] is True
    with pytest.raises(UserError, match='upgrade'):
        write_lora(path, LORA, {'collectionlora.schema': '2.0'})
    save(path, tensors_of(), {'collectionlora.schema': '2.0'})
    with pytest.raises(UserError, match='upgrade'):
        read_header(path)


def test_listing_needs_no_torch(tmp_path):
    effects = [dict(id=f'effect-{i}', trigger=f'<{i}>', category='animal', prompt='p' * 200) for i in range(180)]
    write_lora(tmp_path / 'x.safetensors', LORA, {'collectionlora.effects': effects})
    code = (
        'import sys, time; from collectionlora.files.header import catalogue\n'
        f"t = time.perf_counter(); n = len(catalogue({str(tmp_path / 'x.safetensors')!r})); print(n, 'torch' in sys.modules, time.perf_counter() - t)"
    )
    n, torch_loaded, _ = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert (n, torch_loaded) == ('180', 'False')


def test_resize_is_the_best_approximation():
    big = Lora(
        {
            n: (torch.randn(16, i, generator=_g), torch.randn(o, 16, generator=_g))
            for n, (i, o) in list(MODULES.items())[:3]
        }
    )
    for n in big.factors:
        u, s, v = torch.linalg.svd(big.delta(n))
        best = (u[:, :5] * s[:5]) @ v[:5]
        assert torch.allclose(resize(big, rank=5).delta(n), best, atol=1e-3)
    kept = resize(big, energy=0.9).meta['kept']
    assert all(0.9 <= k < 1 for k in kept.values())
    with pytest.raises(UserError):
        resize(big)


def test_our_validator_agrees_with_jsonschema():
    import jsonschema

    from collectionlora.files.header import HEADER_SCHEMA, violation

    jsonschema.Draft202012Validator.check_schema(HEADER_SCHEMA)
    assert read_json(data_dir() / 'lora_header.schema.json') == HEADER_SCHEMA, (
        'publish the schema again: core.write_json(core.data_dir()/"lora_header.schema.json", HEADER_SCHEMA)'
    )
    effect = dict(id='a', category='b', trigger='c')
    good = {'collectionlora.schema': '1.0', 'collectionlora.payload_sha256': '0' * 64}
    odd = [
        None,
        True,
        1,
        -1,
        1.5,
        '',
        'x',
        '1.0',
        [],
        ['x'],
        [1],
        {},
        {'sha256': 'f' * 64},
        [{'sha256': 'f' * 64}],
        [{'sha256': 'F'}],
        [effect],
        [effect | {'strength': True}],
        [effect | {'metrics': {'a': None}}],
        [effect | {'metrics': {'a': 'b'}}],
        [effect | {'id': ''}],
        [{}],
        {'times': []},
        {'times': [0.5]},
        {'times': [2]},
        {'steps': 0},
        {'steps': 8, 'shift': 0},
        {'steps': 8, 'shift': 3},
        {'stochastic': 1},
        [effect | {'name': {'en': 'n'}}],
        [effect | {'name': {'en': 1}}],
        [effect | {'conflicts': ['x', 2]}],
    ]
    checker = jsonschema.Draft202012Validator(HEADER_SCHEMA)
    seen = set()
    for key in HEADER_SCHEMA['properties']:
        for value in odd:
            header = good | {key: value}
            ok = checker.is_valid(header)
            seen.add(ok)
            assert (violation(header, HEADER_SCHEMA, 'h') is None) == ok, (key, value)
    assert seen == {True, False}


def test_broken_catalogues_are_not_written(tmp_path):
    for effects, match in (
        ([dict(id='a', category='b')], 'no trigger'),
        ([dict(id='a', category='b', trigger='c')] * 2, 'share one id'),
    ):
        with pytest.raises(UserError, match=match):
            write_lora(tmp_path / 'x.safetensors', LORA, {'collectionlora.effects': effects})
    assert not list(tmp_path.iterdir())


HEADER = {
    'collectionlora.effects': [dict(id='a', category='animal', trigger='bekuz')],
    'collectionlora.sampling': {'times': [1.0, 0.5]},
    'modelspec.title': 'x',
}


def test_a_folded_file_takes_no_alpha(tmp_path):
    write_lora(tmp_path / 'c.safetensors', LORA, HEADER)
    with pytest.raises(UserError, match='folded in; leave alpha out'):
        convert(tmp_path / 'c.safetensors', tmp_path / 'd.safetensors', alpha=8.0)
    assert not (tmp_path / 'd.safetensors').exists()


@pytest.mark.parametrize('dialect', DIALECTS)
def test_the_catalogue_survives_every_dialect(dialect, tmp_path):
    write_lora(tmp_path / 'c.safetensors', LORA, HEADER)
    out = tmp_path / ('out' if dialect == 'peft' else 'out.safetensors')
    convert(tmp_path / 'c.safetensors', out, dialect)
    convert(out, tmp_path / 'back.safetensors')
    assert file_sha256(tmp_path / 'back.safetensors') == file_sha256(tmp_path / 'c.safetensors')


def test_a_config_beside_a_converted_file_is_not_applied_to_it(tmp_path):
    write_lora(tmp_path / 'c.safetensors', LORA)
    convert(tmp_path / 'c.safetensors', tmp_path / 'pf', 'peft')
    with pytest.raises(UserError, match='would be applied to the file'):
        convert(tmp_path / 'c.safetensors', tmp_path / 'pf' / 'out.safetensors', 'diffsynth')
    for target, dialect, match in (
        (tmp_path / 'pf', 'kohya', 'is a folder'),
        (tmp_path / 'p.safetensors', 'peft', 'name a folder'),
        (tmp_path / 'k.safetensors', 'kohya', 'positive'),
    ):
        with pytest.raises(UserError, match=match):
            convert(tmp_path / 'c.safetensors', target, dialect, out_alpha=0.0 if match == 'positive' else None)
        assert not target.exists() or target.is_dir()


def test_an_adapter_folder_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    from collectionlora.files import lora as lora_files

    write_lora(tmp_path / 'c.safetensors', LORA)
    convert(tmp_path / 'c.safetensors', tmp_path / 'pf', 'peft')
    before = {p.name: p.read_bytes() for p in (tmp_path / 'pf').iterdir()}

    def full(*args, **kw):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(lora_files, 'write_table', full)
    with pytest.raises(OSError):
        convert(tmp_path / 'c.safetensors', tmp_path / 'pf', 'peft')
    assert {p.name: p.read_bytes() for p in (tmp_path / 'pf').iterdir()} == before


def test_missing_modules_are_not_counted_without_a_base(tmp_path):
    write_lora(tmp_path / 'c.safetensors', Lora(dict(list(LORA.factors.items())[:5])))
    assert report(read_lora(tmp_path / 'c.safetensors'))['missing'] is None
    assert report(read_lora(tmp_path / 'c.safetensors', MODULES, allow_missing=True))['missing'] == len(MODULES) - 5


def test_an_unknown_tensor_is_not_said_to_be_a_difference(tmp_path):
    path = save(
        tmp_path / 'x.safetensors',
        {**tensors_of(), 'diffusion_model.transformer_blocks.0.attn.to_q.extra': torch.zeros(1)},
    )
    with pytest.raises(UserError, match='is not a LoRA factor') as e:
        read_lora(path)
    assert 'difference' not in str(e.value)


def test_a_family_with_the_same_names_is_told_by_its_width(tmp_path):
    path = save(
        tmp_path / 'x.safetensors',
        {
            'transformer.transformer_blocks.0.attn.to_q.lora_A.weight': torch.zeros(2, 1536),
            'transformer.transformer_blocks.0.attn.to_q.lora_B.weight': torch.ones(1536, 2),
        },
    )
    with pytest.raises(UserError, match='Stable Diffusion 3'):
        read_lora(path)


def test_a_file_of_a_newer_minor_version_can_be_rewritten(tmp_path):
    header = {
        'collectionlora.schema': '1.7',
        'collectionlora.effects': json.dumps([dict(id='a', trigger='b', category='c')]),
        'collectionlora.novelty': '[1]',
    }
    foreign, path = tmp_path / 'f.safetensors', tmp_path / 'x.safetensors'
    write_lora(foreign, LORA)
    from collectionlora.files.header import write_table

    table = read_table(foreign)
    raw = foreign.read_bytes()[table.start :]
    write_table(
        path, [(n, e.dtype, e.shape, lambda e=e: raw[e.begin : e.end]) for n, e in table.tensors.items()], header
    )
    convert(path, tmp_path / 'y.safetensors')
    assert lora_hash(read_lora(tmp_path / 'y.safetensors')) == lora_hash(LORA)
    assert (
        read_header(tmp_path / 'y.safetensors')['collectionlora.schema'] == '1.0'
        and catalogue(tmp_path / 'y.safetensors')[0]['id'] == 'a'
    )


@pytest.mark.parametrize(
    'field, value',
    [
        ('sampling', {'times': [1, 'x']}),
        ('sampling', {'times': 5}),
        ('sampling', {'cfg': 'a'}),
        ('effects', [dict(id='a', trigger={}, category='c')]),
        ('effects', [dict(id='a', trigger='b')]),
        ('effects', [dict(id='a', trigger='b', category='c', metrics=[])]),
        ('parents', [{}]),
    ],
)
def test_a_header_that_breaks_the_schema_is_refused_when_read(field, value, tmp_path):
    path = save(tmp_path / 'x.safetensors', tensors_of(), {f'collectionlora.{field}': json.dumps(value)})
    with pytest.raises(UserError, match=f'collectionlora.{field}'):
        read_header(path)


def job_info(rank):
    return {
        'ss_network_dim': str(rank),
        'ss_base_model_version': 'qwen_image',
        'ss_output_name': 'mine',
        'ss_tag_frequency': json.dumps({'1_mine': {'mine': 20}}),
    }


def unmodulated(tensors):
    return {k: v for k, v in tensors.items() if '_mod_' not in k}


def rooted(tensors):
    "What musubi's converter does with alpha/r = 1/2: its root on either side, and no alpha any more."
    return {k: v * 0.5**0.5 for k, v in tensors.items() if not k.endswith('.alpha')}


# the rows of the reference's producer table with the metadata that the producer adds: (tensors, metadata, modules that it leaves out, guess)
PRODUCERS = {
    'musubi-tuner': (
        unmodulated(tensors_of(prefix='lora_unet_', flat=True, alpha=2, **DOWN)),
        job_info(RANK)
        | {'sshs_model_hash': 'ab' * 32, 'modelspec.architecture': 'Qwen-Image-Edit-Plus', 'modelspec.title': 'mine'},
        ['*_mod.1'],
        'kohya / musubi-tuner',
    ),
    'musubi-tuner, converted': (
        rooted(tensors_of(alpha=2)),
        job_info(RANK) | {'modelspec.architecture': 'Qwen-Image-Edit-Plus'},
        (),
        'musubi-tuner (converted)',
    ),
    'ai-toolkit': (
        tensors_of(),
        {
            'format': 'pt',
            'software': json.dumps({'name': 'ai-toolkit', 'version': '0.5'}),
            'training_info': json.dumps({'step': 2000}),
            'sshs_legacy_hash': 'ab' * 4,
        },
        (),
        'ai-toolkit',
    ),
    'DiffSynth': (tensors_of(prefix='', adapter='.default'), None, (), 'DiffSynth'),
    'Lightning': (tensors_of(prefix='', alpha=8, **DOWN), {'format': 'pt'}, (), 'Lightning'),
}


@pytest.mark.parametrize('name', PRODUCERS)
def test_a_producers_file_with_its_own_metadata_means_the_same_everywhere(name, tmp_path):
    tensors, metadata, left_out, guess = PRODUCERS[name]
    path = save(tmp_path / 'x.safetensors', tensors, metadata)
    got = read_lora(path, MODULES, allow_missing=left_out)
    want = changed({n: LORA.factors[n] for n in got.factors})
    assert (
        close(changed(got.factors), want)
        and got.meta['producer'] == guess
        and report(got)['missing'] == len(MODULES) - len(got.factors) == 4 * bool(left_out)
    )
    if left_out:
        with pytest.raises(UserError, match='24 of 28 modules.*_mod.1'):
            read_lora(path, MODULES)
    assert close(through_diffusers(path), want) and close(changed(comfyui_view(tensors, MODULES)), want)
    convert(path, tmp_path / 'c.safetensors', modules=MODULES, allow_missing=left_out)
    out = safetensors.torch.load_file(tmp_path / 'c.safetensors')
    for seen in (
        through_diffusers(tmp_path / 'c.safetensors'),
        changed(comfyui_view(out, MODULES)),
        changed(diffsynth_view(out, MODULES)),
    ):
        assert close(seen, want)


def test_a_peft_folders_weights_alone_work_nowhere_else_and_their_conversion_everywhere(tmp_path):
    peft = peft_model(dict(r=RANK, lora_alpha=2 * RANK))
    peft.save_pretrained(tmp_path / 'peft')
    want, tensors = output(peft), safetensors.torch.load_file(tmp_path / 'peft' / 'adapter_model.safetensors')
    assert not comfyui_view(tensors, MODULES) and not diffsynth_view(tensors, MODULES)
    assert close(through_diffusers(tmp_path / 'peft' / 'adapter_model.safetensors'), PLAIN)  # silently ignored
    convert(tmp_path / 'peft', tmp_path / 'c.safetensors', modules=MODULES, allow_missing=True)
    out = safetensors.torch.load_file(tmp_path / 'c.safetensors')
    for seen in (
        through_diffusers(tmp_path / 'c.safetensors'),
        changed(comfyui_view(out, MODULES)),
        changed(diffsynth_view(out, MODULES)),
    ):
        assert close(seen, want)


def test_the_smaller_factor_takes_the_scale(tmp_path):
    write_lora(tmp_path / 'a.safetensors', LORA)
    convert(tmp_path / 'a.safetensors', tmp_path / 'k.safetensors', 'lightning', out_alpha=1.0)
    stored, got = (
        safetensors.torch.load_file(tmp_path / 'k.safetensors'),
        read_lora(tmp_path / 'k.safetensors', dtype=None),
    )
    for n, (a, b) in got.factors.items():
        scaled = [not torch.equal(t, stored[f'{n}.lora_{part}.weight']) for part, t in (('down', a), ('up', b))]
        assert scaled == ([True, False] if a.numel() < b.numel() else [False, True])
    assert close(changed(got.factors))


def test_derived_fields_follow_the_catalogue_and_an_authors_own_stay(tmp_path):
    path, effects = tmp_path / 'c.safetensors', [dict(id='a', trigger='zon qel', category='c', metrics={'bcr': 0.5})]
    write_lora(path, LORA, {'collectionlora.effects': effects, 'modelspec.title': 'My effects'})
    annotate(path, {'a': {'trigger': 'fal mir'}})
    assert (
        read_header(path)['modelspec.trigger_phrase'] == 'fal mir'
        and read_header(path)['modelspec.title'] == 'My effects'
    )
    shrink(path, tmp_path / 'small.safetensors', rank=2)
    small = read_header(tmp_path / 'small.safetensors')
    assert small['modelspec.title'] == 'My effects' and small['modelspec.merged_from'] == file_sha256(path)
    assert 'metrics' not in small['collectionlora.effects'][0]  # they were the whole's
    convert(path, tmp_path / 'd.safetensors', 'diffusers')
    assert read_header(tmp_path / 'd.safetensors')['modelspec.trigger_phrase'] == 'fal mir'


def test_nothing_is_called_smaller_that_is_not(tmp_path):
    write_lora(tmp_path / 'c.safetensors', LORA)
    for kw, match in ((dict(rank=RANK + 1), f'has rank {RANK}'), (dict(rank=2, mixed=True), 'give energy')):
        with pytest.raises(UserError, match=match):
            shrink(tmp_path / 'c.safetensors', tmp_path / 's.safetensors', **kw)
    assert not (tmp_path / 's.safetensors').exists()


def test_a_layer_outside_the_blocks_is_refused_by_a_base_with_the_reason(tmp_path):
    path = save(
        tmp_path / 'x.safetensors',
        tensors_of()
        | {
            'diffusion_model.proj_out.lora_A.weight': torch.ones(RANK, 32),
            'diffusion_model.proj_out.lora_B.weight': torch.ones(16, RANK),
        },
    )
    with pytest.raises(UserError, match='proj_out lies outside the transformer blocks'):
        read_lora(path, MODULES)


def test_double_precision_is_not_rounded_without_a_word(tmp_path):
    path = save(tmp_path / 'x.safetensors', {k: v.double() for k, v in tensors_of().items()})
    with pytest.raises(UserError, match='float64.*--dtype float32'):
        convert(path, tmp_path / 'c.safetensors')
    convert(path, tmp_path / 'c.safetensors', dtype=torch.float32)
    assert lora_hash(read_lora(tmp_path / 'c.safetensors')) == lora_hash(LORA)
