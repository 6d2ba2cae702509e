"One shared base against three copies for every term, the fake score's included, whatever role is active at backward."

import pytest
import torch

from collectionlora.dmd import fake_loss
from collectionlora.flow import add_noise

from test_distill import engine_of, gradients, SMALL, ThreeCopies


def every_gradient(engine):
    "Gradients of all three terms of the student, and of the fake score on its samples."
    found = gradients(engine, 'one')
    x0, cond = engine.fake_samples('one', 5)
    g = torch.Generator().manual_seed(7)
    eps, t = engine.noise(cond, g), engine.times_like(len(cond), g, 1.0, 0.02, 1.0)
    loss = fake_loss(engine.velocity('fake', add_noise(x0, eps, t), t, cond), x0, eps)
    return found | {'fake': engine.flat_gradient(loss, 'fake')}


@pytest.mark.parametrize('options', [(), ('checkpointing',), ('offload',), ('checkpointing', 'offload')])
@pytest.mark.parametrize('at_backward', ['base', 'student', 'fake', 'teacher'])
def test_every_term_has_the_gradient_of_three_copies(folder, world, roles, options, at_backward):
    one = engine_of(world, SMALL)
    one.batch('one', 0)  # puts the teacher into the slot before the copies are made
    apart = every_gradient(engine_of(world, SMALL, ThreeCopies(folder, roles)))
    for option in options:
        getattr(roles, option)(True)
    flat_gradient = type(one).flat_gradient

    def elsewhere(loss, role):
        with roles.using(at_backward):
            return flat_gradient(one, loss, role)

    one.flat_gradient = elsewhere
    shared = every_gradient(one)
    assert set(shared) == {'bs', 'ts', 'fm', 'fake'} == set(apart)
    for name in shared:
        assert torch.equal(shared[name], apart[name]) and shared[name].abs().max() > 0, name
