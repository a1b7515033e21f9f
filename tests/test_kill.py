"""The short form of tests/kill.py: every stage killed once or twice in mid-work, and the same bytes in the end."""

import kill

import prepare_data


def test_every_stage_survives_kill_9(tmp_path):
    counts = kill.torture(prepare_data.find_orl(), 6, 1, tmp_path)
    assert counts == dict.fromkeys(("prepare", "recognizer", "generator", "mining", "sampling", "evaluation"), 1)
