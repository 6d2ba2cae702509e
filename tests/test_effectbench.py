"The benchmark's manifest: regenerated bit for bit, refused when changed."

import json

import pytest

from collectionlora import world
from collectionlora.core import UserError
from collectionlora.judge import effectbench as bench


@pytest.mark.parametrize('size', ['toy', 'small'])
def test_the_shipped_manifest_is_what_the_code_builds(size):
    assert bench.load(size) == bench.build(size)


def test_the_paper_size_is_the_papers_protocol():
    m = bench.load('paper')
    assert (
        m['instructions'] == 5000
        and len(m['effects']) == 50
        and {c: len(v) for c, v in m['images'].items()} == dict(animal=100, portrait=100)
    )
    assert [e['id'] for e in m['effects']][:20] == [e['id'] for e in bench.load('small')['effects']]
    assert m['images']['animal'][:20] == bench.load('small')['images']['animal']


def test_a_changed_manifest_is_refused(tmp_path):
    m = bench.load('toy')
    m['effects'][0]['prompt'] = 'something else'
    (tmp_path / 'm.json').write_text(json.dumps(m))
    with pytest.raises(UserError, match='sha256 does not match'):
        bench.load(tmp_path / 'm.json')
    with pytest.raises(UserError, match='no such manifest'):
        bench.load(tmp_path / 'none.json')
    m['version'] = 9
    (tmp_path / 'm.json').write_text(json.dumps(m))
    with pytest.raises(UserError, match='version 9'):
        bench.load(tmp_path / 'm.json')


def test_a_changed_effect_is_noticed(monkeypatch):
    real = world.apply_effect
    monkeypatch.setattr(world, 'apply_effect', lambda *a: 255 - real(*a))
    with pytest.raises(UserError, match='target of .* is drawn differently'):
        bench.verify(bench.load('toy'))


def test_a_changed_renderer_is_noticed(monkeypatch):
    real = world.render
    monkeypatch.setattr(world, 'render', lambda spec: real(spec) // 2)
    with pytest.raises(UserError, match='drawn differently'):
        bench.verify(bench.load('toy'))


def test_unknown_size_and_effect():
    with pytest.raises(UserError, match="unknown size 'papr'.*paper"):
        bench.build('papr')
    with pytest.raises(UserError, match='not in the manifest'):
        bench.items(bench.load('toy'), effects=['oil'])


def test_parts_are_parts_of_the_whole():
    m = bench.load('toy')
    e = m['effects'][1]['id']
    a, b = bench.items(m, [e], images=2), [i for i in bench.items(m) if i.effect == e][:2]
    assert [(i.effect, i.image, i.noise) for i in a] == [(i.effect, i.image, i.noise) for i in b] and (
        a[1].truth == b[1].truth
    ).all()


@pytest.mark.parametrize('text, says', [('[]', 'holds a list and no manifest'), ('{"version"', 'not valid JSON')])
def test_what_is_no_manifest_is_called_so(tmp_path, text, says):
    (tmp_path / 'm.json').write_text(text)
    with pytest.raises(UserError, match=says):
        bench.load(tmp_path / 'm.json')


def test_a_misspelt_size_is_guessed():
    with pytest.raises(UserError, match="no such manifest.*did you mean 'paper'"):
        bench.load('papr')
