"""A real stream dealt over ranks, each rank's share made by worker processes: nothing depends on who makes what."""

import dataclasses
import multiprocessing

import pytest
import torch
from pairwise import pairwise

from minibert.batch import Batch
from minibert.data import Mixture, PretrainingData, split_documents
from minibert.train import World

BATCHES = 12


@pytest.fixture(scope="module")
def streams(store, tokenizer):
    """By name; the second is mixed of two halves of the store's documents."""

    def stream(documents=None, **options):
        options = {"seed": 3, "max_length": 37, "batch_tokens": 500, "documents": documents} | options
        return lambda: PretrainingData(store, tokenizer, **options)

    halves = split_documents(store.num_documents, 0.5, seed=1, at_least=2)
    parts = [stream(documents, mask_unit="span", mask_count=70) for documents in halves]
    return {"pairs": stream(), "mixture": lambda: Mixture([part() for part in parts], [0.7, 0.3])}


def share(make, world, worker, workers):
    """Every `workers`-th batch of a rank from number `worker` on, as it is dealt: tensors by field, and the cursor."""
    data, cursor, made = make(), 0, []
    for turn in range(BATCHES // world.size):
        if turn % workers == worker:
            [batch], cursor = world.next_batches(data, cursor, world.size)
            made.append((fields(batch), cursor))
        else:
            for _ in range(world.size):
                cursor = data.skip(cursor)
    return made


def fields(batch):
    return {
        field.name: value.numpy() if isinstance(value, torch.Tensor) else value
        for field in dataclasses.fields(Batch)
        if (value := getattr(batch, field.name)) is not None
    }


def worked(sender, *arguments):
    sender.send(share(*arguments))


def dealt(make, size, workers):
    """The batches of all ranks in the order of `World.all_gather`; each worker of each rank is a process of its own."""
    context, running = multiprocessing.get_context("fork"), {}
    for rank in range(size):
        for worker in range(workers):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=worked, args=(sender, make, World(rank, size), worker, workers))
            process.start()
            running[rank, worker] = process, receiver
    shares = {place: receiver.recv() for place, (_, receiver) in running.items()}
    for process, _ in running.values():
        process.join()
    return [shares[number % size, number // size % workers][number // size // workers] for number in range(BATCHES)]


@pytest.mark.parametrize(("size", "workers", "name"), pairwise([1, 2, 4], [1, 2, 3], ["pairs", "mixture"]))
def test_samples_pairs_and_masks_are_the_same_on_any_number_of_ranks_and_workers(size, workers, name, streams):
    data, cursor = streams[name](), 0
    for number, (made, behind) in enumerate(dealt(streams[name], size, workers)):
        batch, cursor = data.next_batch(cursor)
        expected = fields(batch)
        assert made.keys() == expected.keys() >= {"input_ids", "mlm_rows", "mlm_labels", "nsp_labels", "seq_ids"}
        for field, value in expected.items():
            assert type(made[field]) is type(value)
            assert made[field] == value if isinstance(value, tuple) else (made[field] == value).all(), (number, field)
        if number % size == size - 1:
            assert behind == cursor, "where the next turn begins"
