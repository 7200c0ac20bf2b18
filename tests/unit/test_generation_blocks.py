"""Blocks of the KV cache are given, shared, evicted and returned, and none is lost."""

from __future__ import annotations

import random

from millstream.worker.generation.blocks import BLOCK, NULL, BlockPool, blocks_for, key_of, keys_of


def test_tokens_fill_whole_blocks() -> None:
    assert [blocks_for(tokens) for tokens in (1, BLOCK, BLOCK + 1)] == [1, 1, 2]


def test_a_key_names_a_full_block_and_all_tokens_before_it() -> None:
    tokens = list(range(3 * BLOCK))
    keys = keys_of(tokens)

    assert keys == keys_of([*tokens, 1, 2])
    assert keys[1:] == keys_of(tokens[BLOCK:], keys[0])
    assert not set(keys) & set(keys_of([7, *tokens[1:]]))


def test_no_more_blocks_are_given_than_there_are() -> None:
    pool = BlockPool(3)
    first = pool.take(2)

    assert first
    assert NULL not in first
    assert pool.take(2) is None
    assert pool.available == 1


def test_released_blocks_with_a_name_are_found_again_until_they_are_needed() -> None:
    pool = BlockPool(4)
    keys = keys_of(list(range(3 * BLOCK)))
    blocks = pool.take(3) or []
    for block, key in zip(blocks, keys, strict=True):
        pool.seal(block, key)
    pool.release(blocks)

    assert pool.match(keys) == blocks
    pool.release(blocks)
    # The end of the chain goes first: its beginning is of use without it.
    assert len(pool.take(2) or []) == 2
    assert pool.match(keys) == blocks[:2]


def test_a_block_that_one_request_takes_back_is_given_to_no_other() -> None:
    pool = BlockPool(2)
    key = key_of([1, 2, 3])
    blocks = pool.take(1) or []
    pool.seal(blocks[0], key)
    assert pool.take_back(key) is None
    pool.release(blocks)

    assert pool.take_back(key) == blocks[0]

    assert pool.match([key]) == []
    assert pool.in_use == 1
    assert pool.release(blocks) == blocks


def test_a_shared_block_stays_until_both_release_it() -> None:
    pool = BlockPool(2)
    (key,) = keys_of(list(range(BLOCK)))
    blocks = pool.take(1) or []
    pool.seal(blocks[0], key)
    assert pool.match([key]) == blocks

    pool.release(blocks)
    assert pool.in_use == 1
    assert len(pool.take(1) or []) == 1
    assert pool.take(1) is None


def test_the_first_of_two_equal_blocks_keeps_the_name() -> None:
    pool = BlockPool(2)
    (key,) = keys_of(list(range(BLOCK)))
    first, second = pool.take(2) or []
    pool.seal(first, key)
    pool.seal(second, key)

    assert pool.release([second]) == [second]
    assert pool.match([key]) == [first]


def test_a_lower_limit_evicts_and_a_higher_one_gives_more() -> None:
    pool = BlockPool(4)
    keys = keys_of(list(range(2 * BLOCK)))
    blocks = pool.take(2) or []
    for block, key in zip(blocks, keys, strict=True):
        pool.seal(block, key)
    pool.release(blocks)
    pool.limit(1)

    assert pool.match(keys) == blocks[:1]
    assert pool.take(1) is None
    pool.limit(3)
    assert len(pool.take(2) or []) == 2


def test_blocks_are_numbered_anew_and_keep_their_names() -> None:
    pool = BlockPool(6)
    keys = keys_of(list(range(2 * BLOCK)))
    pool.take(1)
    used = pool.take(2) or []
    gone = pool.take(2) or []
    for block, key in zip(used, keys, strict=True):
        pool.seal(block, key)
    pool.release(gone)

    moved = pool.compact()

    assert sorted(moved.values()) == [1, 2, 3]
    assert pool.match(keys) == [moved[block] for block in used]
    assert pool.size == 3


def test_no_block_is_lost_or_given_twice_over_many_requests() -> None:
    rng = random.Random(1)
    pool = BlockPool(20)
    chains = [keys_of([chain] * (BLOCK * 4)) for chain in range(6)]
    held: list[list[int]] = []
    for _ in range(5_000):
        if held and rng.random() < 0.5:
            pool.release(held.pop(rng.randrange(len(held))))
            continue
        keys = rng.choice(chains)
        found = pool.match(keys)
        more = pool.take(rng.randrange(3))
        if more is None:
            pool.release(found)
            continue
        for block, key in zip(more, keys[len(found) :], strict=False):
            pool.seal(block, key)
        held.append([*found, *more])
        used = {block for blocks in held for block in blocks}
        assert pool.in_use == len(used)
        assert max(used, default=0) <= pool.size <= 20
    for blocks in held:
        pool.release(blocks)

    assert pool.available == 20
    assert len(pool.take(20) or []) == 20
