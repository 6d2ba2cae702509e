"One shared base against three copies for every term, the fake score's included, whatever role is active at backward."
import pytest
import torch

from collectionlora.dmd import fake_loss
from collectionlora.flow import add_noise
from test_distill import SMALL, ThreeCopies, engine_of, gradients, make_world, open_world


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('world')


@pytest.fixture(scope='module')
def world(folder):
    args = open_world(folder, make_world(folder))
    yield args
    args[1].close()


@pytest.fixture
def roles(world):
    b = world[0].backbone
    for k, role in enumerate(('student', 'fake')):
        b.add_role(role, 2, seed=k)
        with torch.no_grad(): b.flat(role).normal_(0, .1, generator=torch.Generator().manual_seed(10 + k))
    yield b
    b.checkpointing(False); b.offload(False)
    for role in ('student', 'fake'): b.remove(role)


def every_gradient(engine):
    "Gradients of all three terms of the student, and of the fake score on its samples."
    found = gradients(engine, 'one')
    x0, cond = engine.fake_samples('one', 5)
    g = torch.Generator().manual_seed(7)
    eps, t = engine.noise(cond, g), engine.times_like(len(cond), g, 1., .02, 1.)
    loss = fake_loss(engine.velocity('fake', add_noise(x0, eps, t), t, cond), x0, eps)
    return found | {'fake': engine.flat_gradient(loss, 'fake')}


@pytest.mark.parametrize('options', [(), ('checkpointing',), ('offload',), ('checkpointing', 'offload')])
@pytest.mark.parametrize('at_backward', ['base', 'student', 'fake', 'teacher'])
def test_every_term_has_the_gradient_of_three_copies(folder, world, roles, options, at_backward):
    one = engine_of(world, SMALL)
    one.batch('one', 0)                                # puts the teacher into the slot before the copies are made
    apart = every_gradient(engine_of(world, SMALL, ThreeCopies(folder, roles)))
    for option in options: getattr(roles, option)(True)
    flat_gradient = type(one).flat_gradient
    def elsewhere(loss, role):
        with roles.using(at_backward): return flat_gradient(one, loss, role)
    one.flat_gradient = elsewhere
    shared = every_gradient(one)
    assert set(shared) == {'bs', 'ts', 'fm', 'fake'} == set(apart)
    for name in shared: assert torch.equal(shared[name], apart[name]) and shared[name].abs().max() > 0, name
