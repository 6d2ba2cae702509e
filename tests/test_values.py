"""What is written reads back as the same values and types, and what is given is read as decimal numbers or refused."""

import json, math
from dataclasses import replace

import pytest
import yaml
from hypothesis import example, given, settings, strategies as st

from collectionlora import core
from collectionlora.core import nearest, parse_yaml, read_json, read_yaml, text_lines, UserError, write_json, write_yaml
from collectionlora.files.effects import load_effect, write_effect
from collectionlora.judge.gate import made_up_rows, read_rows, write_rows

many = settings(max_examples=300, deadline=None)
SEPARATORS = '\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029'
ODD = [
    *(
        '012',
        '08',
        '1e5',
        '1E5',
        '12e03',
        '.5',
        '1.',
        '0x1F',
        '0b11',
        '0o17',
        '1_000',
        '1_',
        '-0',
        '+1',
        '1:20',
        '1:20.5',
    ),
    *('2026-01-01', '2026-01-01T10:00:00Z', '2026-13-45', '.inf', '-.INF', '.nan', 'nan', 'inf', '1e999', '9' * 60),
    *(
        'yes',
        'No',
        'ON',
        'off',
        'y',
        'N',
        'true',
        'False',
        'null',
        'Null',
        'NONE',
        '~',
        '',
        '=',
        '<<',
        '-',
        '- a',
        '---',
    ),
    *(
        '...',
        '#a',
        'a #b',
        'a: b',
        ':',
        '?',
        '? a',
        '*a',
        '&a',
        '!a',
        '!!int 1',
        '%a',
        '@a',
        '`a',
        '|',
        '>',
        '{a}',
        '[a]',
    ),
    *(
        '"',
        "'",
        "it's",
        'a\\b',
        ' a',
        'a ',
        '\ta',
        'a\t',
        '\ufeffa',
        'a\ufeff',
        '\x00',
        '\x7f',
        '\U0001f600',
        '\ufffe',
        '夜',
    ),
    *('word ' * 400, 'w' * 5000, ' ' * 200, 'a\n\n b\n', *(f'a{s}b' for s in SEPARATORS), *SEPARATORS),
]
texts = st.one_of(
    st.sampled_from(ODD),
    st.from_regex(r'[-+.0-9eExob_:naifNIyYoO~ ]{0,12}', fullmatch=True),
    st.text(st.characters(exclude_categories=('Cs',)), max_size=30),
    st.text(alphabet=st.sampled_from(f'ab -#:,\'"[]{{}}&*!|>%@?\\{SEPARATORS}'), max_size=200),
)
numbers = st.one_of(st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False, allow_infinity=False))
values = st.recursive(
    texts | numbers, lambda inner: st.dictionaries(texts, inner, max_size=4) | st.lists(inner, max_size=4), max_leaves=8
)


def same(a, b) -> bool:
    "Equality that tells 1 from 1.0 and from True."
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b and (not isinstance(a, float) or math.copysign(1, a) == math.copysign(1, b))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('values')


@pytest.mark.parametrize('text', ODD, ids=lambda t: ascii(t)[:20])
def test_a_text_that_looks_like_something_else_stays_text(text, folder):
    given = {'value': text, text: [text, {text: text}]}
    write_yaml(folder / 'a.yaml', given)
    assert same(read_yaml(folder / 'a.yaml'), given)
    assert same(yaml.safe_load((folder / 'a.yaml').read_bytes()), given)  # and PyYAML's own reader agrees
    write_json(folder / 'a.json', given)
    assert same(read_json(folder / 'a.json'), given)


@many
@given(st.dictionaries(texts, values, min_size=1, max_size=4))
def test_whatever_is_written_as_yaml_reads_back(folder, given):
    write_yaml(folder / 'b.yaml', given)
    assert same(read_yaml(folder / 'b.yaml'), given)
    assert same(yaml.safe_load((folder / 'b.yaml').read_bytes()), given)


@many
@given(values)
@example('\udc80 a name that is no UTF-8')
def test_whatever_is_written_as_json_reads_back(folder, given):
    write_json(folder / 'b.json', given)
    assert same(read_json(folder / 'b.json'), given)


DISPUTED = '010 -07 08 +01 1_000 1_0.5 0x1F 0X1f 0b11 0o17 1:20 190:20:30 1:20.5 0_1'.split()


@pytest.mark.parametrize('text', DISPUTED)
@pytest.mark.parametrize('inside', ['{}', '[1, {}]', 'a: {}', '!!int {}'])
def test_a_number_that_programs_read_differently_is_refused(text, inside):
    with pytest.raises(UserError, match='-p steps: .* quotes'):
        parse_yaml(inside.format(text), '-p steps')
    assert parse_yaml(f'"{text}"', '') == text


@many
@given(st.from_regex(r'[-+]?[0-9.eExob_:]{1,9}', fullmatch=True))
def test_what_is_read_as_a_number_is_the_decimal_one(text):
    try:
        value = parse_yaml(text, 'here')
    except UserError:
        return
    if isinstance(value, int):
        assert str(value) == text.lstrip('+').replace('-0', '0') or text == '-0'
    elif isinstance(value, float):
        assert value == float(text)
    else:
        assert value in (text, {text.rstrip(':'): None}) or isinstance(value, dict)


def test_dates_are_text_and_exponents_numbers():
    told = parse_yaml('[2026-01-01, 2026-99-99, 1e5, 1E5, 12e03, 1.5e3, .5, 10, -3, yes, ~]', '')
    assert same(told, ['2026-01-01', '2026-99-99', 1e5, 1e5, 12e3, 1.5e3, 0.5, 10, -3, True, None])


UNREADABLE = [
    '!!binary aa',
    '!!set {a}',
    '!!python/name:os.system x',
    '&a [*a]',
    '&a {b: *a}',
    'a\x00b',
    '[' * 5000,
    '9' * 5000,
]
UNREADABLE += [
    '1e999',
    '{1: 2, 1: 3}',
    '? [a]',
    '*a',
    'a: b: c',
    '!!int x',
    '!!float y',
    '!!timestamp 2026-01-01',
    '\ud800',
]


@pytest.mark.parametrize('text', UNREADABLE, ids=lambda t: ascii(t)[:20])
def test_a_yaml_that_cannot_be_read_is_one_sentence(text):
    with pytest.raises(UserError, match='^here: ') as e:
        parse_yaml(text, 'here')
    assert '\n' not in str(e.value)


@many
@given(st.text(max_size=40))
def test_any_text_is_a_value_or_one_sentence(text):
    try:
        json.dumps(parse_yaml(text, 'here'))
    except UserError as e:
        assert '\n' not in str(e)


@pytest.mark.parametrize('code', ['utf-16', 'utf-16-le', 'cp1252', 'shift-jis'])
@pytest.mark.parametrize('read', [read_yaml, read_json, text_lines])
def test_a_file_that_is_not_utf8_is_one_sentence_and_a_mark_is_no_content(read, code, folder):
    text = '{"a": "夜"}' if code == 'shift-jis' else '{"a": "é"}'
    (folder / 'c').write_bytes(text.encode(code) + b'\xff')
    with pytest.raises(UserError, match='not UTF-8 text'):
        read(folder / 'c')
    (folder / 'c').write_bytes(text.encode('utf-8-sig'))
    assert read(folder / 'c') == ([(1, text)] if read is text_lines else json.loads(text))


@many
@given(st.lists(st.text(st.characters(exclude_categories=('Cs',), exclude_characters='\n\0'), max_size=20), max_size=5))
def test_lines_end_at_line_feeds_only(folder, lines):
    (folder / 'd').write_bytes('\n'.join(lines).encode())
    kept = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not (lines and lines[0].startswith('\ufeff')):
        assert text_lines(folder / 'd') == kept


def test_a_zero_is_no_text(folder):
    (folder / 'z').write_bytes('a\nb'.encode('utf-16-le'))  # without a mark, as some Windows programs save it
    with pytest.raises(UserError, match='not UTF-8 text .a zero at character 1.; save it again as UTF-8'):
        text_lines(folder / 'z')


def test_rows_and_effects_keep_every_text(folder):
    (row, *_) = made_up_rows('ours', 0.3, effects=1, images=1)
    row = replace(row, effect='a\u2028b\x85c')
    write_rows(folder / 'rows.jsonl', [row, row])
    raw = (folder / 'rows.jsonl').read_text()
    (folder / 'rows.jsonl').write_bytes(raw.replace('\\u2028', '\u2028').replace('\\u0085', '\x85').encode())
    assert [r.effect for r in read_rows(folder / 'rows.jsonl')] == [row.effect] * 2
    import numpy as np

    pixels = np.zeros((64, 64, 3), 'u1')
    for id in ('012', '1e5', '20260101', 'no', '0x1F', 'Null'):
        fields = dict(id=id, category='1:20', prompt=f'to\u2028{id}', description='~', trigger='2026-01-01')
        write_effect(folder / id, pairs=[(pixels, pixels)], **fields)
        found = load_effect(folder / id)
        assert {k: getattr(found, k) for k in fields} == fields


def test_a_long_list_of_what_is_known_ends_in_its_count():
    said = nearest('nothing like it', [f'effect-{i:02}' for i in range(20)])
    assert said.endswith('effect-11 and 8 more.') and '...' not in said


def test_an_absent_kept_record_says_where_records_are(tmp_path, monkeypatch):
    with pytest.raises(UserError) as inside:
        read_json(core.results_dir() / 'none.json')
    monkeypatch.setattr(core, 'in_checkout', lambda: False)  # as installed from a wheel
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='none.json: no such file; kept records are in the repository, not in the package'):
        read_json(core.results_dir() / 'main_job' / 'none.json')
    with pytest.raises(UserError) as own:
        read_json(tmp_path / 'none.json')
    assert str(inside.value).endswith('none.json: no such file') and str(own.value).endswith('none.json: no such file')
