"""Documents: what is read, and what is refused with a sentence."""

import io

import pypdf
import pytest

from easyllm.core.errors import DataError
from easyllm.retrieval.documents import MAX_BYTES, read_document


def read(path, content):
    path.write_bytes(content)
    return read_document(path, path.name)


def test_text_is_read_in_the_usual_encodings(tmp_path):
    assert read(tmp_path / "a.txt", "茶\r\ntea".encode()).text == "茶\ntea"
    assert read(tmp_path / "b.txt", "茶".encode("utf-16")).text == "茶"
    assert read(tmp_path / "c.txt", "绿茶和红茶".encode("gb18030")).text == "绿茶和红茶"
    found = read(tmp_path / "d.md", b"---\ntitle: x\n---\n# Tea <!-- no -->\n")
    assert found.is_markdown
    assert "Tea" in found.text
    assert "no" not in found.text


def test_html_is_read_without_scripts(tmp_path):
    page = b"<html><body><p>Green tea is a kind of tea.</p><script>x()</script></body></html>"
    assert read(tmp_path / "a.html", page).text.strip() == "Green tea is a kind of tea."


def pdf_of(*pages):
    """A PDF whose pages show one line of text each."""
    writer = pypdf.PdfWriter()
    for text in pages:
        page = writer.add_blank_page(200, 200)
        stream = pypdf.generic.DecodedStreamObject()
        stream.set_data(f"BT /F1 12 Tf 10 100 Td ({text}) Tj ET".encode())
        font = pypdf.generic.DictionaryObject(
            {
                pypdf.generic.NameObject("/Type"): pypdf.generic.NameObject("/Font"),
                pypdf.generic.NameObject("/Subtype"): pypdf.generic.NameObject("/Type1"),
                pypdf.generic.NameObject("/BaseFont"): pypdf.generic.NameObject("/Helvetica"),
            }
        )
        fonts = pypdf.generic.DictionaryObject({pypdf.generic.NameObject("/F1"): font})
        page[pypdf.generic.NameObject("/Resources")] = pypdf.generic.DictionaryObject(
            {pypdf.generic.NameObject("/Font"): fonts}
        )
        page[pypdf.generic.NameObject("/Contents")] = writer._add_object(stream)
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def test_a_pdf_is_read_with_its_pages(tmp_path):
    found = read(tmp_path / "a.pdf", pdf_of("Tea is green", "Coffee is black"))
    assert found.text == "Tea is green\n\nCoffee is black"
    assert found.page_starts == (0, 14)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"\x7fELF\x00\x01\x02", "is binary"),
        ("b.txt", bytes(range(128, 256)) * 4, "is not text"),
        ("c.pdf", b"%PDF-1.7 broken", "is not a readable PDF"),
        ("d.pdf", b"", "is not a readable PDF"),
        ("e.md", b" \n", "contains no text"),
        ("f.pdf", pdf_of(""), "scans"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, name, content, reason):
    with pytest.raises(DataError, match=reason):
        read(tmp_path / name, content)


def test_an_encrypted_pdf_and_a_damaged_one_are_refused(tmp_path):
    writer = pypdf.PdfWriter(clone_from=io.BytesIO(pdf_of("secret")))
    writer.encrypt("key", algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    with pytest.raises(DataError, match="is encrypted"):
        read(tmp_path / "a.pdf", out.getvalue())
    with pytest.raises(DataError, match="readable PDF"):
        read(tmp_path / "b.pdf", pdf_of("x")[:200])


def test_a_file_of_a_gigabyte_is_refused_unread(tmp_path):
    path = tmp_path / "big.txt"
    with path.open("wb") as file:
        file.truncate(2**30)  # sparse
    with pytest.raises(DataError, match=f"more than the maximum of {MAX_BYTES:,}"):
        read_document(path, "big.txt")
