"""docs/proof-triton.md says what the tests prove, no more and no less."""

import proof_matrix


def test_the_document_has_the_table_of_the_tests():
    assert proof_matrix.documented() == proof_matrix.table(), f"run python {proof_matrix.__file__}"


def test_every_feature_is_proven_as_compiled_code():
    """For both generations, in each direction that it has, in fp16 or bf16; TF32 in float32."""
    for line in proof_matrix.table().splitlines()[2:]:
        name, *cells = (cell.strip() for cell in line.split("|")[1:-1])
        columns = cells[4:] if name == proof_matrix.TF32 else cells[:4]
        for direction in (0, 1):
            found = columns[direction::2]
            assert any({"80", "90"} <= set(cell.split()) for cell in found) or not any(found), name


def test_a_feature_without_a_case_shows(monkeypatch):
    monkeypatch.setitem(proof_matrix.FEATURES, "nobody's", lambda case: False)
    assert "| nobody's | – | – | – | – | – | – |" in proof_matrix.table()
