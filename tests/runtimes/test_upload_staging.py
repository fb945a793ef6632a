"""Page-locked memory of uploads: no byte is given out again before the stream was waited for."""

from hypothesis import given
from hypothesis import strategies as st

from edgeprune.runtimes.upload_staging import UploadStaging


def test_places_follow_each_other_until_the_buffer_is_full():
    staging = UploadStaging(10)
    assert [staging.place(4), staging.place(6), staging.place(0), staging.place(1)] == [0, 4, 10, None]


def test_what_was_placed_during_the_wait_keeps_its_place():
    staging = UploadStaging(10)
    staging.place(4)
    mark = staging.mark()
    staging.place(4)
    staging.release(mark)
    assert staging.place(4) is None
    staging.release(staging.mark())
    assert staging.place(4) == 0


@given(st.lists(st.one_of(st.integers(0, 40), st.just("wait"), st.just("mark"), st.just("end of a wait"))))
def test_no_two_copies_that_wait_on_the_stream_share_a_byte(events):
    """Waits of one thread overlap what another one places."""
    staging = UploadStaging(64)
    waiting: list[range] = []
    # By mark, how many of the copies are done when its wait ends.
    begun: list[tuple[int, int]] = []
    done = 0
    for event in events:
        if event in ("wait", "mark"):
            begun.append((staging.mark(), len(waiting)))
        if event in ("wait", "end of a wait") and begun:
            mark, count = begun.pop()
            done = max(done, count)
            staging.release(mark)
        if isinstance(event, int):
            offset = staging.place(event)
            if offset is None:
                continue
            assert offset + event <= staging.size
            placed = range(offset, offset + event)
            assert not any(set(placed) & set(other) for other in waiting[done:])
            waiting.append(placed)
