"""Recorded calls give what the network gives, whatever lay in their tensors before."""

from __future__ import annotations

import pytest
import torch
from conftest import trainer_for

from egrpo.errors import UserError
from egrpo.models.graphs import Graphs, Recorded


def on_cpu(call, inputs, pool):
    """A recording as on CUDA: it reads and writes the same tensors at each replay."""
    output = call(*inputs)
    return Recorded(inputs, lambda: output.copy_(call(*inputs)), output)


def test_replayed_calls_are_those_of_the_network(embeddings):
    trainer = trainer_for(embeddings)
    model, run = trainer.model, trainer.rollouts.sampler
    recorded = Graphs(on_cpu)
    shape = model.image_shape
    plain, replayed = [], []
    for found, graphs in ((plain, None), (replayed, recorded)):
        generator = torch.manual_seed(0)
        for sigma, rows in ((0.7, 4), (0.7, 4), (0.3, 4), (0.3, 3), (0.7, 1)):
            x = torch.randn(rows, *shape, generator=generator)
            prompts = run.conditioning.batch(list(range(rows)), model.device)
            with torch.no_grad(), model.sampling(batch=4) as network:
                assert model.twin is not None
                model.twin.graphs = graphs
                found.append(model.velocity(x, sigma, prompts, network))
    for one, other in zip(plain, replayed, strict=True):  # none was written over by a later call
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert len(recorded.recorded) == 3, "two times of four rows, one of one; three rows are padded"


def test_where_they_cannot_be_is_said(embeddings):
    trainer = trainer_for(embeddings, **{"model.cuda_graphs": True})
    with pytest.raises(UserError, match=r"model\.cuda_graphs: needs a CUDA device"):
        trainer.step()
    with pytest.raises(UserError, match="cuda_graphs: for families sd3 and flux"):
        trainer_for(embeddings, **{"model.cuda_graphs": True, "model.family": "qwen_image"})
