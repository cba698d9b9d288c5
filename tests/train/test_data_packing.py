"""Rows: every token of every story but BOS is a target once, whatever their lengths."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moeconv_train.data.packing import fill_rows, pack, unpack, windows
from moeconv_train.data.records import LENGTHS, TOKENS

LENGTH = 16
# BOS and EOS at least; up to several rows long.
LENGTHS_OF_STORIES = st.lists(st.integers(2, 60), max_size=40)


def numbered(lengths):
    """Stories in which no token occurs twice, so that each can be found again."""
    ends = np.cumsum(lengths)
    return [np.arange(end - n, end, dtype=np.int32) for end, n in zip(ends, lengths, strict=True)]


@given(LENGTHS_OF_STORIES)
@settings(max_examples=200, deadline=None)
def test_packed_rows_predict_every_token_but_bos_once_from_the_one_before(lengths):
    stories = numbered(lengths)
    rows = pack(stories, LENGTH)
    story_of = np.repeat(np.arange(len(lengths)), lengths)
    targets = []
    for row in rows:
        columns = unpack({name: np.asarray(values) for name, values in row.items()}, LENGTH)
        assert {values.shape for values in columns.values()} == {(LENGTH,)}
        assert {values.dtype for values in columns.values()} == {np.dtype(np.int32)}
        used = columns["targets_segmentation"] != 0
        assert used.any()
        assert not used[used.sum() :].any()  # padding is at the end
        for values in columns.values():
            assert not values[~used].any()
        np.testing.assert_array_equal(columns["inputs"][used] + 1, columns["targets"][used])
        np.testing.assert_array_equal(
            columns["inputs_segmentation"], columns["targets_segmentation"]
        )
        segments = columns["inputs_segmentation"][used]
        for segment in range(1, segments.max() + 1):
            inputs = columns["inputs"][: used.sum()][segments == segment]
            positions = columns["inputs_position"][: used.sum()][segments == segment]
            assert len(set(story_of[inputs])) == 1
            np.testing.assert_array_equal(positions, np.arange(len(inputs)))
        targets += columns["targets"][used].tolist()
    expected = [token for story in stories for token in story[1:].tolist()]
    assert sorted(targets) == expected


@given(st.lists(st.integers(1, LENGTH), max_size=200))
@settings(max_examples=200, deadline=None)
def test_each_piece_goes_into_one_row_that_holds_it(sizes):
    rows = list(fill_rows(np.array(sizes, np.int64), LENGTH))
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in row) <= LENGTH for row in rows)
    # The first of each row is the first that was left: the order of the source is kept.
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)


def test_rows_are_nearly_full_on_lengths_like_those_of_stories():
    sizes = np.random.default_rng(0).lognormal(np.log(195), 0.45, 20_000).astype(int).clip(8, 1200)
    rows = len(list(fill_rows(sizes, 2048)))
    assert 0.99 < sizes.sum() / (rows * 2048) <= 1


def test_windows_overlap_by_one_token():
    pieces = [piece.tolist() for piece in windows(np.arange(8), 3)]
    assert pieces == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7]]
    assert [piece.tolist() for piece in windows(np.arange(4), 3)] == [[0, 1, 2, 3]]


def test_a_row_that_is_too_long_for_the_model_is_refused():
    row = {TOKENS: np.arange(10, dtype=np.int32), LENGTHS: np.array([4, 6])}
    assert unpack(row, 8)["inputs"].tolist() == [0, 1, 2, 4, 5, 6, 7, 8]
    with pytest.raises(ValueError, match="takes 8 positions and max_target_length is 7"):
        unpack(row, 7)


def test_no_stories_make_no_rows():
    assert pack([], LENGTH) == []
