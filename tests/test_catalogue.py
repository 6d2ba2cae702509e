"Removing and renaming change a collection's list and nothing else; a begun effect is refused until it is filled."

import shutil

import pytest
from PIL import Image
from typer.testing import CliRunner

from collectionlora import core
from collectionlora.core import UserError
from collectionlora.files.effects import load_effect
from collectionlora.files.header import catalogue, read_header
from collectionlora.run import cli
from collectionlora.use.catalogue import begin_effect, remove_effect, rename_effect


def call(*args):
    return CliRunner().invoke(cli.app, [str(a) for a in args])


@pytest.fixture
def file(tmp_path):
    return shutil.copyfile(core.collection_dir() / 'collection.safetensors', tmp_path / 'c.safetensors')


def ids(file):
    return [e['id'] for e in catalogue(file)]


def test_the_list_changes_and_the_weights_do_not(file):
    before, weights = catalogue(file), read_header(file)['collectionlora.payload_sha256']
    said = call('remove', file, 'candy_world')
    assert said.exit_code == 0 and 'no longer listed' in said.output and before[0]['trigger'] in said.output
    said = call('rename', file, 'lava_creature', 'molten')
    assert said.exit_code == 0 and before[2]['trigger'] in said.output
    assert ids(file) == ['film_strip', 'molten', 'star_dust'] and catalogue(file)[0] == before[1]
    assert catalogue(file)[1] == before[2] | {'id': 'molten'}
    assert read_header(file)['collectionlora.payload_sha256'] == weights
    assert 'molten' in file.with_name('c.html').read_text() and 'candy_world' not in file.with_name('c.html').read_text()


def test_another_file_is_written_on_request(file, tmp_path):
    remove_effect(file, 'candy_world', tmp_path / 'd.safetensors')
    assert len(ids(file)) == 4 and len(ids(tmp_path / 'd.safetensors')) == 3


def test_what_cannot_be_removed_or_renamed(file):
    for id in ids(file)[1:]:
        remove_effect(file, id)
    for change, words in (
        ((remove_effect, file, 'candy'), 'candy_world'),
        ((remove_effect, file, 'candy_world'), 'only effect'),
        ((rename_effect, file, 'candy_world', 'candy_world'), 'already'),
        ((rename_effect, file, 'candy_world', '../x'), 'letters'),
        ((rename_effect, file, 'candy_world', 'x', file.with_name('cat.png')), 'cat.png: a LoRA file ends in'),
    ):
        with pytest.raises(UserError, match=words):
            change[0](*change[1:])


def test_a_renamed_effect_is_edited_by_its_new_name(file, tmp_path):
    rename_effect(file, 'candy_world', 'candy')
    remove_effect(file, 'star_dust')
    Image.new('RGB', (64, 64), 'teal').save(tmp_path / 'x.png')
    old, new = (tmp_path / 'x-candy_world-0.png', tmp_path / 'x-candy-0.png')
    said = call('edit', tmp_path / 'x.png', 'candy', '-c', file, '--out', tmp_path)
    assert said.exit_code == 0, said.output
    assert call('edit', tmp_path / 'x.png', 'candy_world', '--out', tmp_path).exit_code == 0
    assert old.read_bytes() == new.read_bytes()
    for gone in ('candy_world', 'star_dust'):
        assert f'no effect {gone!r}' in call('edit', tmp_path / 'x.png', gone, '-c', file, '--out', tmp_path).output


def test_a_begun_effect_is_to_be_filled(tmp_path):
    said = call('init', tmp_path / 'my-effect')
    assert said.exit_code == 0 and (tmp_path / 'my-effect' / 'README.md').is_file()
    with pytest.raises(UserError, match="'prompt' is empty"):
        load_effect(tmp_path / 'my-effect')
    with pytest.raises(UserError, match='is there already'):
        begin_effect(tmp_path / 'my-effect')


def test_a_link_stays_a_link_and_a_file_keeps_its_permissions(tmp_path):
    from collectionlora.core import replacing

    file, link = tmp_path / 'a.txt', tmp_path / 'b.txt'
    file.write_text('old')
    file.chmod(0o600)
    link.symlink_to(file)
    with replacing(link) as part:
        part.write_text('new')
    assert link.is_symlink() and file.read_text() == 'new' and file.stat().st_mode & 0o777 == 0o600
