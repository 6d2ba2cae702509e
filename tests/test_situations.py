"""More situations of the kinds in test_inputs: what only people read about a LoRA, other models by other fields, wrappers of trainers, files that are something else, numbers and aliases."""

import json, os, struct, tarfile, zlib

import pytest
import torch
from hypothesis import given, HealthCheck, settings, strategies as st
from PIL import Image
from test_inputs import KOHYA, named, NAMES, RANK, save, scale_of
from typer.testing import CliRunner

import collectionlora.run.cli as cli
from collectionlora.core import collection_dir, parse_yaml, read_text, UserError
from collectionlora.files.adopt import listing
from collectionlora.files.checked import inspect_file
from collectionlora.files.effects import load_general
from collectionlora.files.family import check_base, nested
from collectionlora.files.lora import convert, read_lora
from collectionlora.files.pictures import load_image
from collectionlora.files.weights import what_it_is

TEACHER = collection_dir() / 'teachers' / 'candy_world.safetensors'
PLAIN = json.dumps({'r': RANK, 'lora_alpha': 8})

# ---- strength that only people read: never applied, never passed over in silence

BESIDE = {
    'x.json': PLAIN,
    'x_config.yaml': 'lora_rank: 2\nlora_alpha: 8\n',
    'config.json': PLAIN,
    'lora_config.json': json.dumps({'lora': {'rank': RANK, 'alpha': 8}}),
    'train_config.yaml': 'rank: 2\nalpha: 8\n',
    'x.toml': 'network_dim = 2\nnetwork_alpha = 8\n',
    'Training.YML': 'adapter:\n  alpha: 8\n',
    'args.json': json.dumps({'args': {'lora_alpha': '8'}}),
    'x.metadata.json': json.dumps({'training': [{'linear': RANK, 'linear_alpha': 8}]}),
}


@pytest.mark.parametrize('name', BESIDE)
def test_settings_beside_that_say_another_alpha_are_refused_with_their_name(name, tmp_path):
    path = save(tmp_path / 'x.safetensors', named())
    (tmp_path / name).write_text(BESIDE[name])
    with pytest.raises(UserError, match='alpha 8') as e:
        read_lora(path)
    assert name in str(e.value) and '--alpha' in str(e.value)
    assert scale_of(path, alpha=8.0) == 4
    (tmp_path / name).write_text(BESIDE[name].replace('8', '2'))  # the strength that would be used
    assert scale_of(path) == 1
    kohya = save(tmp_path / 'x.safetensors', named(**KOHYA, alpha=2))
    (tmp_path / name).write_text(BESIDE[name])
    assert scale_of(kohya) == 1 and any('not applied' in n for n in read_lora(kohya).meta['notes'])


def test_settings_count_for_whom_they_can_belong_to(tmp_path):
    path = save(tmp_path / 'x.safetensors', named())
    save(tmp_path / 'other.safetensors', named())
    (tmp_path / 'other.json').write_text(PLAIN)
    assert scale_of(path) == 1  # another's
    (tmp_path / 'train.json').write_text(PLAIN)
    with pytest.raises(UserError, match='train.json'):
        read_lora(path)  # anybody's
    (tmp_path / 'train.json').write_text('{"lora_alpha": 8')  # damaged: no concern of the LoRA
    (tmp_path / 'optim.json').write_text(json.dumps({'optimizer': {'alpha': 0.9}, 'blend_alpha': 3}))
    (tmp_path / 'config.yaml').write_text(
        'job: extension\nconfig:\n  process:\n  - network: {linear: 2, linear_alpha: 8}\n'
    )
    assert scale_of(path) == 1
    convert(path, tmp_path / 'ours.safetensors')
    (tmp_path / 'ours.json').write_text(PLAIN)
    assert scale_of(tmp_path / 'ours.safetensors') == 1


def test_what_musubi_folded_is_not_counted_again(tmp_path):
    path = save(tmp_path / 'x.safetensors', named(), {'ss_network_alpha': '8', 'ss_network_dim': '2'})
    (tmp_path / 'x.toml').write_text('network_dim = 2\nnetwork_alpha = 8\n')
    assert scale_of(path) == 1


TEXTS = {
    'args': '--lora_rank 2 --lora_alpha 8',
    'command': json.dumps(['train.py', '--lora_rank', '2', '--lora_alpha', '8']),
    'config': 'lora:\n  rank: 2\n  alpha: 8\n',
    'peft': 'LoraConfig(r=2, lora_alpha=8, target_modules={"to_q"})',
    'pairs': json.dumps([['lora_alpha', 8]]),
}


@pytest.mark.parametrize('field', TEXTS)
def test_a_text_in_the_header_that_says_another_alpha_is_refused(field, tmp_path):
    path = save(tmp_path / 'x.safetensors', named(), {field: TEXTS[field]})
    with pytest.raises(UserError, match=f'{field} says alpha 8.*--alpha'):
        read_lora(path)
    assert scale_of(save(path, named(), {field: TEXTS[field].replace('8', '2')})) == 1
    assert scale_of(save(path, named(**KOHYA, alpha=4), {field: TEXTS[field]})) == 2


def test_prose_and_factors_are_said_and_not_applied(tmp_path):
    said = {'modelspec.description': 'a LoRA alpha 8 style', 'lora_scale': '2.0', 'optimizer': 'RMSprop(alpha=0.9)'}
    path = save(tmp_path / 'x.safetensors', named(), said)
    assert scale_of(path) == 1
    notes = ' '.join(read_lora(path).meta['notes'])
    assert 'description says alpha 8' in notes and 'lora_scale is 2' in notes and 'optimizer' not in notes


@pytest.mark.parametrize('text', ["{'r': 2, 'lora_alpha': 8}", json.dumps(PLAIN), json.dumps(json.dumps(PLAIN))])
def test_structures_in_any_writing_are_looked_into(text, tmp_path):
    assert nested(text) == {'r': 2, 'lora_alpha': 8}
    assert scale_of(save(tmp_path / 'x.safetensors', named(), {'setup': text})) == 4


@pytest.mark.parametrize('text', ['{' * 5000, '[' * 5000 + ']' * 5000, '"' + 'x' * 50, "{'a': __import__('os')}"])
def test_what_is_no_structure_stays_text(text):
    assert nested(text) == text


@pytest.mark.parametrize(
    'where', ['ADAPTER_CONFIG.JSON', 'config/adapter_config.json', 'Lora_Config/Adapter_Config.yml']
)
def test_an_adapter_config_is_found_in_any_case_and_folder_and_with_a_mark(where, tmp_path):
    path = save(tmp_path / 'x.safetensors', named())
    (tmp_path / where).parent.mkdir(exist_ok=True)
    (tmp_path / where).write_bytes(b'\xef\xbb\xbf' + PLAIN.encode())
    assert scale_of(path) == 4
    (tmp_path / where).write_bytes(PLAIN.encode('utf-16'))
    with pytest.raises(UserError, match='not UTF-8'):
        read_lora(path)


NAMED_SO = ['candy_r2_a8.safetensors', 'candy-rank2-alpha8-000010.safetensors', 'candy_dim2alpha8/lora.safetensors']


@pytest.mark.parametrize('name', NAMED_SO)
def test_a_name_that_says_another_alpha_is_refused(name, tmp_path):
    path = save(tmp_path / name, named())
    with pytest.raises(UserError, match="name '.*' says alpha 8.*--alpha"):
        read_lora(path)
    assert scale_of(path, alpha=8.0) == 4
    assert scale_of(save(path, named(), {'software': '{"name": "ai-toolkit"}'})) == 1  # folded by the trainer
    assert scale_of(save(path, named(**KOHYA, alpha=4))) == 2


@pytest.mark.parametrize('name', ['candy_v1_alpha8', 'candy_r4_a8', 'candy_r2_a2', 'far2_a8', 'candy_r2_a8k'])
def test_names_of_versions_other_ranks_and_the_same_alpha_are_not(name, tmp_path):
    assert scale_of(save(tmp_path / f'{name}.safetensors', named())) == 1


def test_the_text_of_a_model_card_is_said_and_not_applied(tmp_path):
    path = save(tmp_path / 'x.safetensors', named())
    for text in ('# Candy\n\nrank: 2, alpha: 8\n', '---\ntags: [lora]\n---\nLoRA rank 2, alpha 8. --- end'):
        (tmp_path / 'README.md').write_text(text)
        assert scale_of(path) == 1 and any('README.md' in n and 'alpha 8' in n for n in read_lora(path).meta['notes'])
    (tmp_path / 'README.md').write_text('rank: 2, alpha: 2\n')
    assert not any('README.md' in n for n in read_lora(path).meta['notes'])


@pytest.mark.parametrize('alpha', [float('nan'), float('inf'), 0.0])
def test_an_alpha_tensor_that_is_no_strength_is_called_so(alpha, tmp_path):
    with pytest.raises(UserError, match='alpha must be finite and not zero'):
        read_lora(save(tmp_path / 'x.safetensors', named(**KOHYA, alpha=alpha)))


# ---- another model's LoRA, by any field

OTHERS = {
    'ss_network_module': 'networks.lora_flux',
    'modelspec.implementation': 'https://github.com/black-forest-labs/flux',
    'base model': 'FLUX.1-dev',
    'Base-Model': 'SDXL 1.0',
    'baseModel': 'Flux.1 D',
    'model': 'flux1-dev.safetensors',
    'trained_on': 'black-forest-labs/FLUX.1-dev',
    'pretrained_model_path': '/m/flux1-dev',
    'checkpoint': 'flux1-dev-fp8.safetensors',
    'diffusion_model': '/x/wan2.2.safetensors',
    'arch': 'flex2',
    'model_type': 'kontext',
    'sd_version': 'SDXL',
    'train_config': "{'model': {'arch': 'hunyuan_video'}}",
}


@pytest.mark.parametrize('field', OTHERS)
def test_any_field_about_a_model_is_read(field, tmp_path):
    path = save(tmp_path / 'x.safetensors', named(), {field: OTHERS[field]})
    with pytest.raises(UserError, match='another model') as e:
        read_lora(path)
    assert field in str(e.value)


@pytest.mark.parametrize(
    'field', ['text_encoder', 'resume_from', 'output_name', 'modelspec.title', 'ss_vae_model', 'tags']
)
def test_fields_about_other_things_are_not(field, tmp_path):
    assert scale_of(save(tmp_path / 'x.safetensors', named(), {field: 'flux Qwen2.5-VL style'})) == 1


def test_a_known_field_for_ours_outweighs_a_guess_and_an_unknown_base_is_said():
    attention = [f'transformer_blocks.{i}.attn.to_q' for i in range(4)]
    assert check_base({'base_model': 'Qwen/Qwen-Image-Edit', 'checkpoint': 'flux-look'}, attention) == []
    assert 'not known here' in check_base({'base_model': 'someone/new'}, attention)[0]
    assert 'Layered' in check_base({'ss_base_model_version': 'qwen_image_layered'}, attention)[0]
    deep = [f'transformer_blocks.{i}.attn.to_q' for i in range(54)]  # HunyuanVideo 1.5
    assert 'no field names its base' in check_base({}, deep)[0]
    with pytest.raises(UserError, match='made for the base nano 0123456789ab, the base in use is fff'):
        check_base({'collectionlora.base': {'hash': '0123456789abcdef', 'id': 'nano'}}, attention, base='f' * 64)
    with pytest.raises(UserError, match='made for the base 0123456789ab, the base in use is fff'):  # of an older version
        check_base({'collectionlora.base': {'hash': '0123456789abcdef'}}, attention, base='f' * 64)
    assert check_base({}, [f'transformer_blocks.{i}.attn.to_q' for i in range(60)]) == []


def test_a_model_card_and_a_managers_notes_name_the_base(tmp_path):
    path = save(tmp_path / 'x.safetensors', named())
    for name, text in (
        ('README.md', '---\nbase_model: black-forest-labs/FLUX.1-dev\ntags: [lora]\n---\n# Style\n'),
        ('x.civitai.info', '{"baseModel": "Flux.1 D", "model": {"name": "style"}}'),
        ('x.metadata.json', '{"base_model": "SDXL 1.0"}'),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=f'{name}.*another model'):
            read_lora(path)
        (tmp_path / name).unlink()
    (tmp_path / 'README.md').write_text('---\nbase_model: black-forest-labs/FLUX.1-dev\n---\n')
    save(tmp_path / 'y.safetensors', named())
    assert scale_of(path) == 1  # the card may be about the other one
    (tmp_path / 'workflow.json').write_text('{"nodes": [{"unet_name": "flux1-dev.safetensors"}]}')
    assert scale_of(path) == 1


# ---- what the file is


def test_wrappers_of_trainers_are_taken_off(tmp_path):
    deep = lambda k, mid: k.replace('transformer_blocks.', f'{mid[0]}transformer_blocks.').replace(
        '.attn.', f'.{mid[1]}attn.'
    )
    for first, second in (('module.', ''), ('_orig_mod.', '_fsdp_wrapped_module._checkpoint_wrapped_module.')):
        tensors = {deep(k, (first, second)): v for k, v in named(prefix='').items()}
        assert scale_of(save(tmp_path / 'x.safetensors', tensors)) == 1
    flat = {k.replace('_attn_', '__orig_mod_attn_'): v for k, v in named(**KOHYA, alpha=4).items()}
    assert scale_of(save(tmp_path / 'x.safetensors', flat)) == 2


def test_a_lokr_of_two_whole_matrices_has_a_factor_of_one_whatever_its_alpha(tmp_path):
    parts, want = {}, {}
    for n in NAMES:
        stem = f'lycoris_{n.replace(".", "_")}'
        w1, w2 = torch.randn(2, 3), torch.randn(5, 4)
        parts |= {f'{stem}.lokr_w1': w1, f'{stem}.lokr_w2': w2, f'{stem}.alpha': torch.tensor(1e10)}
        want[n] = torch.kron(w1, w2)
    got = read_lora(save(tmp_path / 'x.safetensors', parts))
    assert all(torch.allclose(got.delta(n), want[n], atol=1e-5) for n in NAMES)
    assert inspect_file(tmp_path / 'x.safetensors')['scale'] == [1.0]


MODELS = {
    'a whole model': {'transformer_blocks.0.attn.to_q.weight': (4, 4), 'img_in.weight': (4, 4)},
    'an embedding': {'emb_params': (4, 4)},
    'an autoencoder': {'encoder.conv_in.weight': (4, 4)},
}


@pytest.mark.parametrize('name', MODELS)
def test_weights_of_something_else_are_called_so(name, tmp_path):
    path = save(tmp_path / 'x.safetensors', {k: torch.zeros(s) for k, s in MODELS[name].items()})
    with pytest.raises(UserError, match='none is a factor of a LoRA.*whole model'):
        read_lora(path)


LOOKALIKES = {
    'zeros': (bytes(5000), 'zeros alone'),
    'database': (b'SQLite format 3\0' + bytes(99), 'SQLite'),
    'program': (b'\x7fELF' + bytes(99), 'program'),
    'film': (struct.pack('>I', 32) + b'ftypisom' + bytes(99), 'film or picture'),
    'hub': (b'Entry not found', 'answer of a server'),
    'login': (b'Invalid username or password.', 'answer of a server'),
    'store': (b'<Error><Code>AccessDenied</Code></Error>', 'answer of a server'),
    'annex': (b'/annex/objects/SHA256E-s1--ab.safetensors\n', 'git annex get'),
}


@pytest.mark.parametrize('name', LOOKALIKES)
def test_more_lookalikes_are_called_what_they_are(name, tmp_path):
    content, word = LOOKALIKES[name]
    (tmp_path / 'x.safetensors').write_bytes(content)
    with pytest.raises(UserError, match=word):
        read_lora(tmp_path / 'x.safetensors')


def test_a_tar_and_what_is_no_regular_file(tmp_path):
    with tarfile.open(tmp_path / 't.safetensors', 'w') as t:
        t.add(TEACHER, 'x.safetensors')
    assert 'tar archive' in what_it_is(tmp_path / 't.safetensors')
    os.mkfifo(tmp_path / 'pipe.safetensors')  # opening it would wait for ever
    for path in (tmp_path / 'pipe.safetensors', '/dev/null'):
        for read in (read_lora, load_image):
            with pytest.raises(UserError, match='no regular file'):
                read(path)


# ---- numbers and aliases


@pytest.mark.parametrize('words', [['--seed', '1_0'], ['--strength', '1_0'], ['--seed', '0x10'], ['--seeds', '1e1']])
def test_numbers_on_the_command_line_are_decimal_or_refused(words):
    done = CliRunner().invoke(cli.app, ['edit', '--list', *words])
    assert done.exit_code == 2 and 'Invalid value' in done.output


def test_aliases_that_unfold_without_end_are_refused_at_once():
    laughs = ', '.join(['&a0 [x, x]', *(f'&a{k} [{", ".join([f"*a{k - 1}"] * 9)}]' for k in range(1, 20))])
    with pytest.raises(UserError, match='more than 1,000,000 values'):
        parse_yaml(f'[{laughs}]', 'run.yaml')
    for text in ('&a [*a]', 'a: &b\n  c: *b\n'):
        with pytest.raises(UserError, match='run.yaml'):
            parse_yaml(text, 'run.yaml')
    assert parse_yaml('a: &x [1, 2]\nb: *x\n', '') == {'a': [1, 2], 'b': [1, 2]}


def test_adobe_rgb_by_the_colour_space_of_exif_is_converted(tmp_path):
    exif = Image.Exif()
    exif[0x8769] = {0xA001: 2}
    Image.new('RGB', (8, 8), (200, 30, 30)).save(tmp_path / 'a.png', exif=exif)
    r, g, b = load_image(tmp_path / 'a.png').getpixel((0, 0))
    assert r > 225 and g < 30


# ---- pictures and data sets as they come

NO_PICTURES = {
    'lfs': (b'version https://git-lfs.github.com/spec/v1\noid sha256:a\n', 'git lfs pull'),
    'page': (b'<!DOCTYPE html><html>', 'web page'),
    'svg': (b'<svg xmlns="x"/>', 'SVG'),
    'json': (b'{"error": 1}', 'JSON'),
    'heic': (b'\0\0\0\x18ftypheic' + bytes(50), 'HEIC'),
    'jxl': (b'\xff\x0a' + bytes(range(1, 30)), 'JPEG XL'),
    'empty': (b'', 'empty'),
    'zeros': (bytes(90), 'zeros'),
    'noise': (bytes(range(128, 200)), 'no picture of a known kind'),
}


@pytest.mark.parametrize('name', NO_PICTURES)
def test_what_is_no_picture_is_called_what_it_is(name, tmp_path):
    content, word = NO_PICTURES[name]
    (tmp_path / 'a.png').write_bytes(content)
    with pytest.raises(UserError, match=word) as e:
        load_image(tmp_path / 'a.png')
    assert 'a.png' in str(e.value)


def png(*chunks) -> bytes:
    "A PNG of 16 bits and one colour, with these chunks before its pixels, written without Pillow."
    part = lambda k, d: struct.pack('>I', len(d)) + k + d + struct.pack('>I', zlib.crc32(k + d))
    rows = b''.join(b'\0' + struct.pack('>HHH', 51400, 7710, 7710) * 8 for _ in range(8))
    head = part(b'IHDR', struct.pack('>IIBBBBB', 8, 8, 16, 2, 0, 0, 0))
    body = b''.join(part(*c) for c in chunks) + part(b'IDAT', zlib.compress(rows)) + part(b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n' + head + body


P3 = struct.pack('>8I', 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
COLOURS = {
    'nothing': ((), (200, 30, 30)),
    'linear': (((b'gAMA', struct.pack('>I', 100000)),), (229, 96, 96)),
    'P3 by codes': (((b'cICP', bytes([12, 13, 0, 1])),), (218, 0, 6)),
    'P3 by points': (((b'cHRM', P3),), (218, 0, 6)),
    'sRGB outweighs gamma': (((b'sRGB', b'\0'), (b'gAMA', struct.pack('>I', 100000))), (200, 30, 30)),
}


@pytest.mark.parametrize('name', COLOURS)
def test_what_a_png_says_of_its_colours_is_followed(name, tmp_path):
    chunks, want = COLOURS[name]
    (tmp_path / 'a.png').write_bytes(png(*chunks))
    assert load_image(tmp_path / 'a.png').getpixel((3, 3)) == pytest.approx(want, abs=1)


@pytest.mark.parametrize(
    'chunk',
    [
        (b'gAMA', struct.pack('>I', 2**31 - 1)),
        (b'gAMA', struct.pack('>I', 1)),
        (b'cHRM', struct.pack('>8I', 31270, 32900, 64000, 0, 30000, 60000, 15000, 6000)),
        (b'cHRM', bytes(32)),
        (b'iCCP', b'x\0\0not compressed'),
        (b'iCCP', b'x\0\0' + zlib.compress(b'no profile')),
        (b'cICP', b'\x0c'),
        (b'cICP', bytes([9, 16, 0, 1])),
    ],
)
def test_colours_that_cannot_be_known_are_refused(chunk, tmp_path):
    (tmp_path / 'a.png').write_bytes(png(chunk))
    with pytest.raises(UserError, match='a.png'):
        load_image(tmp_path / 'a.png')


def test_a_name_given_twice_in_a_line_of_json_is_refused(tmp_path):
    Image.new('RGB', (8, 8)).save(tmp_path / 'a.png')
    (tmp_path / 'manifest.jsonl').write_text('{"image": "b.png", "image": "a.png", "prompt": "p"}\n')
    with pytest.raises(UserError, match="line 1.*'image' is given twice"):
        load_general(tmp_path)


words = st.sampled_from(
    ['a', 'b', 'source', 'p.png', '', '\0', '.', '..', 3, 1.5, None, True, {}, {'x': 1}, [], ['a'], [['b']]]
)
ROWS = ('image', 'edit_image', 'prompt', 'edited_image', 'control')
SHAPES = {
    'x.yaml': lambda d: {'config': {'process': [{'datasets': [d], 'trigger_word': d.get('trigger_word')}]}},
    'x.json': lambda d: [d, {'id': 'b', 'instance_data_dir': 'source'}],
    'y.json': lambda d: {'data_backend_config': d.get('id')},
    'x.jsonl': lambda d: {k: d.get(k) for k in ROWS},
    'x.toml': lambda d: d,
}
FIELDS = ('folder_path', 'control_path', 'caption_ext', 'default_caption', 'trigger_word', 'id', 'conditioning_data')
FIELDS += ('instance_data_dir', 'caption_strategy', 'instance_prompt', *ROWS)
MUSUBI = ('image_directory', 'control_directory', 'caption_extension', 'image_jsonl_file')


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(SHAPES)), values=st.fixed_dictionaries({k: words for k in FIELDS + MUSUBI}))
def test_any_configuration_of_another_trainer_is_adopted_or_refused_in_a_sentence(name, values, tmp_path, monkeypatch):
    folder = tmp_path / 'set'
    for side in ('a', 'source'):
        (folder / side).mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8)).save(folder / side / 'p.png')
    (folder / 'away').mkdir(exist_ok=True)
    Image.new('RGB', (8, 8)).save(folder / 'away' / 'q.png')
    monkeypatch.chdir(folder / 'away')  # the names '.' and '..' stay inside tmp_path, wherever they are looked for
    if name == 'x.toml':
        told = {k: json.dumps(v) for k, v in values.items() if k in MUSUBI and isinstance(v, (str, int, float))}
        text = '[[datasets]]\n' + ''.join(f'{k} = {v}\n' for k, v in told.items())
    else:
        text = json.dumps(SHAPES[name](values))
    (folder / name).write_text(text)
    try:
        listing(folder / name)
    except UserError as e:
        assert name in str(e) or tmp_path.name in str(e)


@pytest.mark.parametrize('separator', [',', ';', '\t'])
def test_a_list_with_any_separator_is_adopted(separator, tmp_path):
    for name in ('a.png', 'cond/a.png'):
        (tmp_path / 'set' / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (64, 64), (9, 9, 99)).save(tmp_path / 'set' / name)
    rows = (('file_name', 'source_file_name', 'prompt'), ('a.png', 'cond/a.png', 'make it blue'))
    (tmp_path / 'set' / 'metadata.csv').write_text('\n'.join(separator.join(row) for row in rows))
    done = CliRunner().invoke(cli.app, ['adopt', str(tmp_path / 'set'), str(tmp_path / 'out')])
    assert done.exit_code == 0 and 'make it blue' in done.output, done.output


@pytest.mark.parametrize('content', [b'a\0b', 'make it blue'.encode('utf-16-le')])
def test_text_with_zeros_is_no_text(content, tmp_path):
    (tmp_path / 'a.txt').write_bytes(content)
    with pytest.raises(UserError, match='a.txt: not UTF-8 text .a zero at character 1.'):
        read_text(tmp_path / 'a.txt')


def test_pictures_that_pair_with_nothing_are_said_and_two_of_one_name_refused(tmp_path, caplog):
    for name in ('target/a.png', 'control/a.png', 'control/b.png'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new('RGB', (64, 64), (9, 9, 99)).save(tmp_path / name)
    (tmp_path / 'target' / 'a.txt').write_text('make it blue')
    done = CliRunner().invoke(cli.app, ['adopt', str(tmp_path), str(tmp_path / 'out')])
    assert done.exit_code == 0 and 'b.png: no edited picture of its name' in caplog.text, done.output
    Image.new('RGB', (64, 64), (99, 9, 9)).save(tmp_path / 'control' / 'a.jpg')
    done = CliRunner().invoke(cli.app, ['adopt', str(tmp_path), str(tmp_path / 'out2')])
    assert done.exit_code == 2 and 'has the same name' in ' '.join(done.output.split()), done.output
