"One shared base against three copies for every term, the fake score's included, whatever role is active at backward."

import pytest
import torch

from collectionlora.dmd import fake_loss
from collectionlora.engine import terms
from collectionlora.engine.rollouts import noise, noise_levels
from collectionlora.flow import add_noise

from test_distill import batch_of, engine_of, fake_samples, gradients, SMALL, ThreeCopies


def every_gradient(engine):
    "Gradients of all three terms of the student, and of the fake score on its samples."
    found = gradients(engine, 'one')
    x0, cond = fake_samples(engine, 'one', 5)
    g = torch.Generator().manual_seed(7)
    eps, t = noise(engine, cond, g), noise_levels(engine, len(cond), g, 1.0, 0.02, 1.0)
    loss = fake_loss(engine.velocity('fake', add_noise(x0, eps, t), t, cond), x0, eps)
    return found | {'fake': terms.flat_gradient(engine.backbone, loss, 'fake')}


@pytest.mark.parametrize('options', [(), ('checkpointing',), ('offload',), ('checkpointing', 'offload')])
@pytest.mark.parametrize('at_backward', ['base', 'student', 'fake', 'teacher'])
def test_every_term_has_the_gradient_of_three_copies(folder, world, roles, options, at_backward, monkeypatch):
    one = engine_of(world, SMALL)
    batch_of(one, 'one')  # puts the teacher into the slot before the copies are made
    apart = every_gradient(engine_of(world, SMALL, ThreeCopies(folder, roles)))
    for option in options:
        getattr(roles, option)(True)
    flat_gradient = terms.flat_gradient

    def elsewhere(*args):
        with roles.using(at_backward):
            return flat_gradient(*args)

    monkeypatch.setattr(terms, 'flat_gradient', elsewhere)
    shared = every_gradient(one)
    assert set(shared) == {'bs', 'ts', 'fm', 'fake'} == set(apart)
    for name in shared:
        assert torch.equal(shared[name], apart[name]) and shared[name].abs().max() > 0, name
