"""What lies around a LoRA, an effect and a picture, in the forms in which people have it: scripts, tables, half-broken JSON, folders of settings, BMP and TIFF, captions of any ending."""

import json, struct

import pytest
from PIL import Image, TiffImagePlugin
from test_inputs import KOHYA, named, save, scale_of
from test_pictures import chart, P3, profile
from test_situations import png

from collectionlora.core import UserError
from collectionlora.files.adopt import adopt
from collectionlora.files.effects import load_effect
from collectionlora.files.family import known_faults
from collectionlora.files.lora import read_lora
from collectionlora.files.pictures import load_image
from collectionlora.files.weights import find_weights

# ---- strength

REFUSED = {
    'train.sh': 'accelerate launch train.py --lora_rank 2 --lora_alpha 8\n',
    'RUN.BAT': 'python train.py --network_dim=2 --network_alpha=8\r\n',
    'args.txt': 'lora_rank: 2\nlora_alpha: 8\n',
    'x.xml': '<lora_rank>2</lora_rank><lora_alpha>8</lora_alpha>',
    'config.ini': '[lora]\nrank = 2\nalpha = 8\n',
    'x.json': '{\n // mine: "https://a//b"\n "lora_alpha": 8, /* as ever */ "r": 2,\n}\n',
    'train.yaml': 'seed: 1\n---\nlora_alpha: 8\nr: 2\n',
    'list.json': '[{"lora_alpha": 8, "r": 2}]',
    'wide.json': '{"lora_alpha": 8, "r": 2}'.encode('utf-16'),
    '.hydra/config.yaml': 'lora:\n  rank: 2\n  alpha: 8\n',
    'configs/lora.toml': '[lora]\nrank = 2\nalpha = 8\n',
}


@pytest.mark.parametrize('name', REFUSED)
def test_a_script_or_settings_in_any_writing_and_folder_are_read(name, tmp_path):
    path, text = save(tmp_path / 'x.safetensors', named()), REFUSED[name]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match='says alpha 8.*--alpha') as e:
        read_lora(path)
    assert name in str(e.value) and scale_of(path, alpha=8.0) == 4
    assert scale_of(save(path, named(**KOHYA, alpha=2))) == 1  # every program applies the tensors
    save(path, named())
    other = text.replace('8'.encode('utf-16-le'), '2'.encode('utf-16-le')) if isinstance(text, bytes) else text
    (tmp_path / name).write_bytes(other if isinstance(text, bytes) else text.replace('8', '2').encode())
    assert scale_of(path) == 1


SAID = {
    'README.md': '# Candy\n\n- **Rank:** 2\n- **Alpha:** 8\n',
    'CARD.md': '| rank | alpha |\n|------|------:|\n| 2 | 8 |\n',
    'model.md': 'Trained with rank/alpha: 2/8.\n',
    'log.log': 'rank 2, alpha 8\n',
    'cut.json': '{"r": 2, "lora_alpha": 8',
    'long.json': json.dumps({'lora_alpha': 8, 'r': 2, 'pad': 'x' * 300_000}),
}


@pytest.mark.parametrize('name', SAID)
def test_tables_logs_and_what_is_cut_off_are_said_and_not_applied(name, tmp_path):
    path = save(tmp_path / 'x.safetensors', named())
    (tmp_path / name).write_text(SAID[name])
    assert scale_of(path) == 1 and any(name in n and 'alpha 8' in n for n in read_lora(path).meta['notes'])


@pytest.mark.parametrize('name', ['a_alpha8_rank2', 'a_2dim_8alpha', 'a-a8-r2'])
def test_a_name_in_any_order_counts(name, tmp_path):
    with pytest.raises(UserError, match='name .* says alpha 8'):
        read_lora(save(tmp_path / f'{name}.safetensors', named()))


def test_settings_around_a_checkpoint_count_and_those_around_any_other_folder_do_not(tmp_path):
    (tmp_path / 'lora.yaml').write_text('lora_rank: 2\nlora_alpha: 8\n')
    for folder, refused in (('checkpoint-1000', True), ('step_20', True), ('mine', False)):
        path = save(tmp_path / folder / 'x.safetensors', named())
        if refused:
            with pytest.raises(UserError, match='lora.yaml .lora_alpha. says alpha 8'):
                read_lora(path)
        else:
            assert scale_of(path) == 1


@pytest.mark.parametrize('fields', [{'use_rslora': 'true'}, {'config': '{"lora": {"rs_lora": true, "r": 2}}'}])
def test_rslora_without_an_alpha_is_refused(fields, tmp_path):
    path = save(tmp_path / 'x.safetensors', named(), fields)
    with pytest.raises(UserError, match='rsLoRA.*no field gives alpha.*--alpha'):
        read_lora(path)
    assert scale_of(path, alpha=8.0) == 4
    assert scale_of(save(path, named(**KOHYA, alpha=4), fields)) == 2


# ---- bases, dates and files


@pytest.mark.parametrize(
    'path',
    [
        '/m/FLUX.1-dev/transformer/diffusion_pytorch_model.safetensors',
        '/m/FLUX.1-dev/snapshots/main/transformer/',
        r'D:\m\flux1-dev\unet\diffusion_pytorch_model-00001-of-00003.safetensors',
    ],
)
def test_the_path_of_a_part_of_a_model_names_the_model(path, tmp_path):
    with pytest.raises(UserError, match='FLUX.*another model'):
        read_lora(save(tmp_path / 'x.safetensors', named(), {'pretrained_model_name_or_path': path}))
    assert scale_of(save(tmp_path / 'x.safetensors', named(), {'dit': '/flux/models/my_base/transformer'})) == 1


DAYS = ['2026/02/11', '20260211', '11.02.2026', '1770800000000', '1770800000.5', 'Wed Feb 11 10:00:00 2026']


@pytest.mark.parametrize('field', ['modelspec.date', 'created', 'ss_training_finished_at', 'training_timestamp'])
@pytest.mark.parametrize('day', DAYS)
def test_a_day_in_any_writing_is_compared(day, field):
    header = {'software': '{"name": "ai-toolkit"}', field: day}
    assert 'on 2026-02-11' in known_faults(header)[0]
    later = {'2026/02/11': '2026/05/11', '20260211': '20260511', '11.02.2026': '11.05.2026'}
    assert known_faults(header | {field: later.get(day, '2026-05-11')}) == []


def test_texts_and_folders_without_a_lora_are_called_what_they_are(tmp_path):
    file = tmp_path / 'x.safetensors'
    file.write_text('[InternetShortcut]\nURL=https://example.org/x.safetensors\n')
    with pytest.raises(UserError, match='is a text file'):
        read_lora(file)
    file.write_text("# xet version 0\nfilesize = 9\nhash = 'ab'\n")
    with pytest.raises(UserError, match='Xet pointer'):
        read_lora(file)
    save(file, named())
    file.write_bytes(file.read_bytes() + b'\r\n')
    with pytest.raises(UserError, match='foreign data') as e:
        read_lora(file)
    assert 'truncated' not in str(e.value)
    file.rename(tmp_path / 'x.safetensors.crdownload')
    with pytest.raises(UserError, match='crdownload is a download that did not end'):
        find_weights(tmp_path)
    (tmp_path / 'x.safetensors.crdownload').unlink()
    save(tmp_path / 'inside' / 'y.safetensors', named())
    with pytest.raises(UserError, match='did you mean .*y.safetensors'):
        find_weights(tmp_path)


# ---- colour


def bmp(path, space=b'\0\0\0\0', ends=(0,) * 9, gamma=0):
    "A BMP (version 5) of one colour, with a colour space in its head, written without Pillow."
    pixels, icc = bytes([30, 30, 200]) * 64, profile(P3) if space == b'MBED' else b''
    head = struct.pack('<IiiHHIIiiII', 124, 8, 8, 1, 24, 0, len(pixels), 2835, 2835, 0, 0)
    head += struct.pack('<4I', 0xFF0000, 0xFF00, 0xFF, 0) + space[::-1] + struct.pack('<9i3I', *ends, *[gamma] * 3)
    head += struct.pack('<4I', 4, 124 + len(pixels), len(icc), 0)
    body = head + pixels + icc
    path.write_bytes(b'BM' + struct.pack('<IHHI', 14 + len(body), 0, 0, 14 + 124) + body)
    return path


XYZ = [round(v * (1 << 30)) for v in (0.4866, 0.229, 0.0, 0.2657, 0.6917, 0.0451, 0.1982, 0.0793, 1.0439)]


def test_a_bmp_with_colours_of_its_own_is_converted_or_refused(tmp_path):
    for space in (b'\0\0\0\0', b'sRGB', b'Win '):
        assert load_image(bmp(tmp_path / 'a.bmp', space)).getpixel((0, 0)) == (200, 30, 30)
    for gamma in (0, round(2.2 * 65536), round(65536 / 2.2)):
        assert load_image(bmp(tmp_path / 'a.bmp', ends=XYZ, gamma=gamma)).getpixel((0, 0)) == pytest.approx(
            (218, 0, 6), abs=1
        )
    for space in (b'MBED', b'LINK'):
        with pytest.raises(UserError, match='a.bmp: has a colour profile'):
            load_image(bmp(tmp_path / 'a.bmp', space))
    chart().save(tmp_path / 'plain.bmp')  # a head without any of it
    assert load_image(tmp_path / 'plain.bmp').tobytes() == chart().tobytes()


def test_the_primaries_of_a_tiff_are_followed(tmp_path):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[318], tags[319] = (0.3127, 0.329), (0.68, 0.32, 0.265, 0.69, 0.15, 0.06)
    tags.tagtype[318] = tags.tagtype[319] = 5
    Image.new('RGB', (8, 8), (200, 30, 30)).save(tmp_path / 'a.tif', tiffinfo=tags)
    assert load_image(tmp_path / 'a.tif').getpixel((0, 0)) == pytest.approx((218, 0, 6), abs=1)


def test_a_tiff_that_cannot_be_read_is_called_one(tmp_path):
    (tmp_path / 'a.tif').write_bytes(b'II*\0' + bytes(60))
    with pytest.raises(UserError, match='a TIFF of a kind'):
        load_image(tmp_path / 'a.tif')


def test_a_jpeg_that_lacks_a_part_of_its_profile_is_refused(tmp_path):
    chart().save(tmp_path / 'a.jpg', icc_profile=profile(P3))
    raw = (tmp_path / 'a.jpg').read_bytes()
    at = raw.find(b'ICC_PROFILE\0') + 13
    (tmp_path / 'a.jpg').write_bytes(raw[:at] + b'\2' + raw[at + 1 :])  # says: of two parts
    with pytest.raises(UserError, match='colour profile cannot be read'):
        load_image(tmp_path / 'a.jpg')


@pytest.mark.parametrize('codes', [(1, 13, 0, 0), (1, 13, 6, 1)])
def test_numbers_of_a_film_in_a_png_are_refused(codes, tmp_path):
    (tmp_path / 'a.png').write_bytes(png((b'cICP', bytes(codes))))
    with pytest.raises(UserError, match='narrow range'):
        load_image(tmp_path / 'a.png')


def test_uncalibrated_colours_are_said(tmp_path, caplog):
    exif = Image.Exif()
    exif[0x8769] = {0xA001: 0xFFFF}
    Image.new('RGB', (8, 8), (200, 30, 30)).save(tmp_path / 'a.jpg', exif=exif)
    load_image(tmp_path / 'a.jpg')
    assert 'no profile says' in caplog.text
    caplog.clear()
    chart().save(tmp_path / 'b.jpg', exif=exif, icc_profile=profile(P3))
    load_image(tmp_path / 'b.jpg')
    assert 'no profile says' not in caplog.text


# ---- data sets and manifests


def lay(folder, files: dict):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            Image.new('RGB', (64, 64), (9, 9, 99)).save(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.mark.parametrize('caption', ['a.caption', 'a.TXT', 'a.png.txt', 'a.PNG.caption'])
def test_a_caption_of_any_ending_is_found(caption, tmp_path):
    lay(tmp_path / 'set', {'target/a.png': None, 'control/a.png': None, f'target/{caption}': 'make it blue'})
    assert adopt(tmp_path / 'set', tmp_path / 'out').prompt == 'make it blue'


def test_a_trigger_that_is_empty_leaves_no_gap_and_a_picture_without_a_caption_is_said(tmp_path, caplog):
    files = dict.fromkeys(('target/a.png', 'control/a.png', 'target/b.png', 'control/b.png'))
    lay(tmp_path / 'set', {**files, 'target/a.txt': 'make [trigger] blue'})
    assert adopt(tmp_path / 'set', tmp_path / 'out').prompt == 'make blue'
    assert 'b.png: 1 pictures without a caption' in caplog.text


@pytest.mark.parametrize('config', [True, False])
def test_the_layout_of_kohyas_scripts(config, tmp_path):
    files = {'10_candy/a.png': None, 'conditioning/a.png': None, '10_candy/a.caption': 'make it blue'}
    toml = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "/x/10_candy"\nconditioning_data_dir = "/x/conditioning"\n'
    lay(tmp_path / 'set', files | ({'d.toml': toml + 'caption_extension = ".caption"\n'} if config else {}))
    assert adopt(tmp_path / 'set', tmp_path / 'out').prompt == 'make it blue'


LISTS = {
    'metadata.json': '[{"image": "a.png", "edit_image": ["b.png"], "prompt": "make"}]',
    'metadata.tsv': 'image\tedit_image\tprompt\na.png\tb.png\tmake\n',
    'capitals.csv': 'Image, Edit_Image, Prompt\na.png, b.png, make\n',
    'excel.csv': 'sep=;\r\nimage;edit_image;prompt\r\na.png;b.png;make\r\n',
}


@pytest.mark.parametrize('name', LISTS)
def test_a_list_as_spreadsheets_and_trainers_write_it(name, tmp_path):
    lay(tmp_path / 'set', {'a.png': None, 'b.png': None, name: LISTS[name]})
    for path in (tmp_path / 'set', tmp_path / 'set' / name):
        made = adopt(path, tmp_path / 'out')
        assert made.prompt == 'make' and len(made) == 1


def test_a_prompt_that_yaml_cuts_is_said_and_a_manifest_of_another_name_is_named(tmp_path, caplog):
    text = 'id: e  # its id\ncategory: c\nprompt: paint #3 style\n'
    lay(tmp_path / 'e', {'source/a.png': None, 'target/a.png': None, 'effect.yaml': text})
    assert load_effect(tmp_path / 'e').prompt == 'paint' and '\'prompt\' ends before "#3 style"' in caplog.text
    assert "'id' ends" not in caplog.text
    caplog.clear()
    (tmp_path / 'e' / 'effect.yaml').write_text(text.replace('paint #3 style', '"paint #3 style"'))
    assert load_effect(tmp_path / 'e').prompt == 'paint #3 style' and not caplog.text
    for name in ('effect.yml', 'Effect.yaml'):
        next((tmp_path / 'e').glob('[eE]*')).rename(tmp_path / 'e' / name)
        with pytest.raises(UserError, match=f'has {name}; its name must be effect.yaml'):
            load_effect(tmp_path / 'e')


def test_the_lora_of_one_effect_is_called_that_where_a_collection_is_wanted():
    from collectionlora.core import collection_dir
    from collectionlora.files.header import read_header
    from collectionlora.use.sampling import Recipe

    with pytest.raises(UserError, match='no times or steps; it is the LoRA of one effect.*collectionlora distill'):
        Recipe.read(read_header(collection_dir() / 'teachers' / 'candy_world.safetensors'), 'x')
    with pytest.raises(UserError, match='write the file with its sampling recipe'):
        Recipe.read({}, 'x')
