"""Data sets laid out as the documentation of other trainers says become effect folders that a teacher can be trained from."""

import json

import numpy as np
import pytest
from PIL import Image

from collectionlora.core import nano_dir, UserError
from collectionlora.files.adopt import adopt
from collectionlora.files.effects import images_among, load_effects, load_general
from collectionlora.files.pictures import load_image
from collectionlora.run.execute import execute

COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]


def pictures(folder, names, shift=0, size=(64, 64)):
    folder.mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(names):
        Image.new('RGB', size, tuple(min(255, v + shift) for v in COLOURS[k])).save(folder / name)


def captions(folder, names, text='make it lighter', ending='txt'):
    for name in names:
        (folder / name).with_suffix(f'.{ending}').write_text(text, encoding='utf-8')


def ai_toolkit(d):
    "config/examples/train_lora_qwen_image_edit_2509_32gb.yaml: captions are txt files beside the targets, controls have their names."
    pictures(d / 'images', ['a.png', 'b.png', 'c.png'], 50)
    pictures(d / 'controls', ['a.jpg', 'b.png', 'c.webp'])
    captions(d / 'images', ['a', 'b', 'c'], '[trigger] lighter\n')
    data = [
        {
            'folder_path': '/path/to/images',
            'control_path': ['/path/to/controls'],
            'caption_ext': 'txt',
            'resolution': [512],
        }
    ]
    process = {'type': 'diffusion_trainer', 'trigger_word': 'make it', 'datasets': data}
    text = json.dumps({'job': 'extension', 'config': {'name': 'x', 'process': [process]}, 'meta': {'version': '1.0'}})
    (d / 'train.yaml').write_text('---\n' + text)
    return d / 'train.yaml'


def musubi_folders(d):
    "docs/dataset_config.md: image_directory, control_directory; several controls of a picture are numbered."
    pictures(d / 'image_dir', ['a.png', 'b.png', 'c.png'], 50)
    pictures(d / 'control_dir', ['a.png', 'b_0.png', 'c_0.png'])
    pictures(d / 'control_dir', ['x_1.png', 'b_1.png', 'c_1.png'], 99)
    captions(d / 'image_dir', ['a', 'b', 'c'])
    (d / 'data.toml').write_text(
        '[general]\nresolution = [960, 544]\ncaption_extension = ".txt"\nbatch_size = 1\n\n[[datasets]]\n'
        f'image_directory = "{d}/image_dir"\ncontrol_directory = "{d}/control_dir"\ncache_directory = "/no/cache"\n'
    )
    return d


def musubi_lines(d):
    "docs/dataset_config.md: image_jsonl_file with image_path, control_path and caption."
    pictures(d / 'i', ['a.png', 'b.png', 'c.png'], 50)
    pictures(d / 'c', ['0.png', '1.png', '2.png'])
    rows = [
        dict(image_path=f'{d}/i/{a}.png', control_path=f'c/{k}.png', caption='make it lighter')
        for k, a in enumerate('abc')
    ]
    rows[1] |= {'control_path_0': rows[1].pop('control_path'), 'control_path_1': f'{d}/c/0.png'}
    (d / 'metadata.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    (d / 'data.toml').write_text(f'[[datasets]]\nimage_jsonl_file = "{d}/metadata.jsonl"\ncache_directory = "x"\n')
    return d / 'data.toml'


def simpletuner(d):
    "documentation/quickstart/QWEN_EDIT.md: a data set that names its conditioning data set; equal file names."
    pictures(d / 'edited-images' / 'sub', ['a.png', 'b.png', 'c.png'], 50)
    pictures(d / 'reference-images' / 'sub', ['a.png', 'b.png', 'c.png'])
    captions(d / 'edited-images' / 'sub', ['a', 'b', 'c'])
    first = dict(id='e', type='local', instance_data_dir='/datasets/edited-images', caption_strategy='textfile')
    second = dict(id='r', dataset_type='conditioning', instance_data_dir='/datasets/reference-images')
    third = dict(id='t', dataset_type='text_embeds', cache_dir='cache')
    backends = [first | dict(conditioning_data=['r']), second | dict(conditioning_type='reference_strict'), third]
    (d / 'multidatabackend.json').write_text(json.dumps(backends))
    return d


def diffsynth(d):
    "examples/qwen_image: metadata_edit.csv with image, prompt and edit_image."
    pictures(d, ['a.jpg', 'b.jpg', 'c.jpg'], 50)
    pictures(d / 'edit', ['a.jpg', 'b.jpg', 'c.jpg'])
    rows = [f'{a}.jpg,"make it lighter",edit/{a}.jpg' for a in 'abc']
    (d / 'metadata_edit.csv').write_bytes('\ufeffimage,prompt,edit_image\r\n'.encode() + '\r\n'.join(rows).encode())
    return d


def diffusers(d):
    "An image folder with metadata: columns of pictures end in _file_name; the names are InstructPix2Pix's."
    pictures(d / 'after', ['a.png', 'b.png', 'c.png'], 50)
    pictures(d / 'before', ['a.png', 'b.png', 'c.png'])
    names = ('input_image_file_name', 'edited_image_file_name', 'edit_prompt')
    rows = [dict(zip(names, (f'before/{a}.png', f'after/{a}.png', 'make it lighter'))) for a in 'abc']
    (d / 'metadata.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n')
    return d


def two_folders(d):
    "No configuration: subfolders with telling names."
    pictures(d / 'Target', ['a.png', 'b.png', 'c.png'], 50)
    pictures(d / 'control', ['a.PNG', 'b.png', 'c.png'])
    captions(d / 'Target', ['a', 'b', 'c'], '\ufeffmake it  lighter\r\n')
    return d


def ai_toolkit_inside(d):
    "No configuration: targets and captions in the folder itself, controls in a folder inside."
    pictures(d, ['a.png', 'b.png', 'c.png'], 50)
    pictures(d / 'control', ['a.png', 'b.png', 'c.png'])
    captions(d, ['a', 'b', 'c'])
    return d


def odd_names(d):
    "No configuration and no telling names: the pictures with captions are the targets."
    pictures(d / 'dancing', ['a.png', 'b.png', 'c.png'], 50)
    pictures(d / 'standing', ['a.png', 'b.png', 'c.png'])
    captions(d / 'dancing', ['a', 'b', 'c'])
    return d


def simpletuner_config(d):
    "The trainer's config.json names the list of backends."
    simpletuner(d)
    (d / 'config').mkdir()
    (d / 'multidatabackend.json').rename(d / 'config' / 'backends.json')
    text = (d / 'config' / 'backends.json').read_text().replace('/datasets/', f'{d}/')
    (d / 'config' / 'backends.json').write_text(text)
    (d / 'config' / 'config.json').write_text(json.dumps({'data_backend_config': 'config/qwen/backends.json'}))
    return d / 'config' / 'config.json'


def train_folder(d):
    "An image folder whose list lies with the pictures in train/."
    diffusers(d / 'train')
    return d


def reference_images(d):
    "Names as SimpleTuner's quickstart has them, without its configuration."
    pictures(d / 'edited-images', ['a.png', 'b.png', 'c.png'], 50)
    pictures(d / 'reference-images-a', ['a.png', 'b.png', 'c.png'])
    pictures(d / 'reference-images-b', ['a.png', 'b.png', 'c.png'], 99)
    captions(d / 'edited-images', ['a', 'b', 'c'])
    return d


MORE = [ai_toolkit_inside, odd_names, simpletuner_config, train_folder, reference_images]
LAYOUTS = [ai_toolkit, musubi_folders, musubi_lines, simpletuner, diffsynth, diffusers, two_folders]


@pytest.mark.parametrize('layout', LAYOUTS + MORE, ids=lambda f: f.__name__)
def test_a_layout_becomes_an_effect(layout, tmp_path):
    effect = adopt(layout(tmp_path / 'data'), tmp_path / 'my effect!', category='animal')
    assert (effect.id, effect.category, effect.prompt, len(effect)) == ('my-effect', 'animal', 'make it lighter', 3)
    for source, target, colour in zip(effect.sources, effect.targets, COLOURS):
        before, after = (np.array(load_image(p).getpixel((5, 5))) for p in (source, target))
        assert np.abs(before - colour).max() <= 3 and np.abs(after - np.minimum(255, np.add(colour, 50))).max() <= 3


@pytest.mark.slow
@pytest.mark.parametrize('layout', [ai_toolkit, musubi_folders, simpletuner, diffusers], ids=lambda f: f.__name__)
def test_a_teacher_is_trained_from_an_adopted_data_set(layout, tmp_path):
    adopt(layout(tmp_path / 'data'), tmp_path / 'effect', category='animal')
    small = dict(steps=2, batch=1, rank=1, validate=1, sample_steps=1, cache=str(tmp_path / 'cache'))
    record = execute('teacher', tmp_path / 'out', 'lighter', small, {'effect': tmp_path / 'effect', 'base': nano_dir()})
    assert record['status'] == 'finished' and (tmp_path / 'out' / 'lighter.safetensors').is_file()


def test_what_is_unclear_is_asked_for(tmp_path):
    data = two_folders(tmp_path / 'data')
    (data / 'Target' / 'b.txt').write_text('make it darker')
    with pytest.raises(UserError, match="2 different captions, the most frequent 2 times .'make it lighter'.*--prompt"):
        adopt(data, tmp_path / 'e')
    assert adopt(data, tmp_path / 'e', prompt='make it shine').prompt == 'make it shine'
    (data / 'control' / 'b.png').unlink()
    with pytest.raises(UserError, match='b.png: has no picture of its name'):
        adopt(data, tmp_path / 'f')
    for p in (data / 'Target').glob('*.txt'):
        p.unlink()
    with pytest.raises(UserError, match='no captions.*--prompt|no picture of its name'):
        adopt(data, tmp_path / 'f')


def test_sources_of_another_size_are_cut_to_their_targets(tmp_path, caplog):
    pictures(tmp_path / 'd' / 'target', ['a.png'], 50, (96, 64))
    pictures(tmp_path / 'd' / 'control', ['a.png'], 0, (200, 200))
    effect = adopt(tmp_path / 'd', tmp_path / 'e', prompt='p')
    assert load_image(effect.sources[0]).size == (96, 64) and 'cut and resized' in caplog.text


@pytest.mark.parametrize(
    'name, content, words',
    [
        ('a.toml', b'[[datasets', 'not valid TOML'),
        ('a.toml', b'[[datasets]]\nimage_directory = "x"', 'names no pairs'),
        ('a.toml', b'[[datasets]]\nimage_directory = 3\ncontrol_directory = "y"', '3 is no path'),
        ('a.yaml', b'config: {process: [{datasets: [{folder_path: x, control_path: y}]}]}', 'x does not exist'),
        ('a.yaml', b'config: [1, 2]', 'names no pairs'),
        ('a.json', b'{"a": 1}', 'names no pairs'),
        ('a.json', 'é'.encode('latin-1'), 'not UTF-8'),
        ('a.jsonl', b'{"image": "a.png"}', 'names no source picture'),
        ('a.jsonl', b'[1]', 'must be'),
        ('a.csv', b'image,edit_image\nx.png,y.png', 'does not exist'),
        ('a.png', b'', 'names no pairs'),
    ],
)
def test_a_mistake_is_one_sentence(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as e:
        adopt(tmp_path / name, tmp_path / 'e')
    assert '\n' not in str(e.value)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='no known layout'):
        adopt(tmp_path / 'empty', tmp_path / 'e')


@pytest.mark.parametrize('layout', LAYOUTS, ids=lambda f: f.__name__)
def test_where_an_effect_is_wanted_such_a_data_set_is_recognised(layout, tmp_path):
    layout(tmp_path / 'data')
    with pytest.raises(UserError, match='collectionlora adopt .*data'):
        load_effects(tmp_path / 'data')


def test_captions_inside_an_effect_are_called_that(tmp_path):
    effect = adopt(two_folders(tmp_path / 'data'), tmp_path / 'e', category='animal')
    captions(effect.folder / 'target', ['a'])
    with pytest.raises(UserError, match='a.txt: is a caption beside pictures.*collectionlora adopt'):
        load_effects(effect.folder)


def test_captions_do_not_hinder_editing_a_folder_of_pictures(tmp_path):
    pictures(tmp_path, ['a.png', 'b.png'])
    captions(tmp_path, ['a', 'b'])
    (tmp_path / 'notes.txt').write_text('buy milk')
    (tmp_path / 'deeper').mkdir()
    pictures(tmp_path, ['a.jpg'])
    assert [p.name for p in images_among([tmp_path])] == ['a.jpg', 'a.png', 'b.png']
    with pytest.raises(UserError, match='deeper: holds no picture; give files'):
        images_among([tmp_path / 'deeper'])
    captions(tmp_path / 'deeper', ['a'])
    with pytest.raises(UserError, match='holds no picture .*a.txt is none'):
        images_among([tmp_path / 'deeper'])


@pytest.mark.parametrize('half', ['\\ud800', '\\udfff'])
def test_half_of_a_character_is_refused_with_its_place(half, tmp_path):
    effect = adopt(two_folders(tmp_path / 'data'), tmp_path / 'e')
    (effect.folder / 'effect.yaml').write_text(f'id: a\ncategory: animal\nprompt: "make {half}"\n')
    with pytest.raises(UserError, match="effect.yaml: 'prompt' holds half of a character"):
        load_effects(effect.folder)
    pictures(tmp_path / 'g', ['a.png'])
    (tmp_path / 'g' / 'manifest.jsonl').write_text(f'{{"image": "a.png", "prompt": "make {half}"}}\n')
    with pytest.raises(UserError, match='line 1: prompt .* holds half of a character'):
        load_general(tmp_path / 'g')
