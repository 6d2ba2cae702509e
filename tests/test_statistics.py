"A difference and its interval become one sentence by one rule."

import pytest

from collectionlora.core import UserError
from collectionlora.judge.statistics import verdict

NAN = float('nan')


@pytest.mark.parametrize(
    'given, more, said',
    [
        ((-7, -11, -3), {}, 'better by 7 points [3, 11]'),
        ((7, 3, 11), {}, 'worse by 7 points [3, 11]'),
        ((7, 3, 11), dict(better='higher'), 'better by 7 points [3, 11]'),
        ((-7, -11, -3), dict(better='higher'), 'worse by 7 points [3, 11]'),
        ((-3, -9, 4), {}, 'no clear difference (-3 points [-9, +4])'),
        ((-3, -9, 4), dict(better='higher'), 'no clear difference (-3 points [-9, +4])'),
        ((0, 0, 0), {}, 'no clear difference (0 points [0, 0])'),
        ((2, 0, 4), {}, 'no clear difference (+2 points [0, +4])'),  # a bound of 0 decides nothing
        ((-0.2, -0.4, 0.3), {}, 'no clear difference (0 points [0, 0])'),
        ((-0.2, -0.4, 0.3), dict(digits=1), 'no clear difference (-0.2 points [-0.4, +0.3])'),
        ((3, 0.2, 6), {}, 'worse by 3.0 points [0.2, 6.0]'),  # a clear bound is never shown as 0
        ((0.05, 0.02, 0.08), dict(better='higher', unit='', digits=2), 'better by 0.05 [0.02, 0.08]'),
        ((3, NAN, NAN), {}, 'not decided (+3 points, without an interval)'),
    ],
)
def test_verdict(given, more, said):
    assert verdict(*given, **more) == said


def test_verdict_refuses_what_it_cannot_read():
    with pytest.raises(UserError, match="'lower' or 'higher'"):
        verdict(1, 0, 2, better='smaller')
    with pytest.raises(UserError, match='wrong order'):
        verdict(1, 2, 0)
