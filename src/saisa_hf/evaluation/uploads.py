# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The files that test servers and judges take, in their formats.

A function gets the items, the answers in their order, and the files; it returns the content of the file.
"""

import io
import json
import os
import zipfile
from collections.abc import Sequence
from xml.sax.saxutils import escape

from ..scoring.normalise import m4c_answer
from .files import Files, Item, read_entries, read_tsv


Answers = Sequence[str]
NOT_IN_XML = {code: None for code in range(32) if chr(code) not in "\t\n\r"}
NOT_UPLOADED = ("hint", "category", "source", "image", "comment", "l2-category")


def _json(value: object, indent: int | None = None) -> bytes:
    return json.dumps(value, indent=indent).encode()


def vqav2(items: Sequence[Item], answers: Answers, files: Files) -> bytes:
    """Answers by the ids of questions; empty ones for what a file of questions given as annotations has beside them, because
    the server wants all questions of test2015."""
    found = {item.id: m4c_answer(answer) for item, answer in zip(items, answers)}
    ids = list(found)
    if files.annotations is not None:
        given = read_entries(files.annotations, inside=["annotations", "questions"])
        if "answers" not in given[0]:
            ids = [entry.id("question_id") for entry in given]
    return _json([{"question_id": one, "answer": found.get(one, "")} for one in ids])


def gqa(items: Sequence[Item], answers: Answers, files: Files) -> bytes:
    """Predictions as the official `eval.py` takes them."""
    pairs = zip(items, answers)
    return _json([{"questionId": str(item.id), "prediction": answer.rstrip(".").lower()} for item, answer in pairs])


def vizwiz(items: Sequence[Item], answers: Answers, files: Files) -> bytes:
    """Answers by the names of images."""
    names = [os.path.basename(str(item.images[0])) for item in items]
    return _json([{"image": name, "answer": m4c_answer(answer)} for name, answer in zip(names, answers)])


def mmbench(items: Sequence[Item], answers: Answers, files: Files) -> bytes:
    """A spreadsheet, .xlsx: the rows of the table, without images, with a column `prediction`."""
    rows = {int(row.text("index")): row.values for row in read_tsv(files.questions)}
    header = list(dict.fromkeys(name for values in rows.values() for name in values if name not in NOT_UPLOADED))
    table = [[*header[:6], "prediction", *header[6:]]]
    for item, answer in zip(items, answers):
        if item.id in rows:  # else a rotation that was made here
            values = {**rows[int(item.id)], "prediction": answer}
            table.append([values.get(name, "") for name in table[0]])
    return _spreadsheet(table)


def seed_bench(items: Sequence[Item], answers: Answers, files: Files) -> bytes:
    """Lines of `question_id` and `prediction`."""
    lines = [_json({"question_id": item.id, "prediction": answer}) for item, answer in zip(items, answers)]
    return b"".join(line + b"\n" for line in lines)


def mm_vet(items: Sequence[Item], answers: Answers, files: Files) -> bytes:
    """Answers by the names of questions, for the judge."""
    ids = [str(item.id) for item in items]
    named = {own if own.startswith("v1_") else f"v1_{own}": answer for own, answer in zip(ids, answers)}
    return _json(named, indent=2)


def _spreadsheet(table: list[list[str]]) -> bytes:
    """The least that is an .xlsx: one sheet of texts, whole numbers as numbers."""

    def cell(value: str) -> str:
        if value.isascii() and value.isdecimal() and len(value) < 15 and str(int(value)) == value:
            return f"<c><v>{value}</v></c>"
        text = escape(value.translate(NOT_IN_XML).encode("utf-8", "replace").decode())
        return f'<c t="inlineStr"><is><t xml:space="preserve">{text}</t></is></c>'

    office = "http://schemas.openxmlformats.org"
    rows = "".join(f"<row>{''.join(map(cell, row))}</row>" for row in table)
    kind, part = f"{office}/package/2006", "application/vnd.openxmlformats-officedocument.spreadsheetml"
    main, of = f"{office}/spreadsheetml/2006/main", f"{office}/officeDocument/2006/relationships"
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{kind}/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/xl/workbook.xml" ContentType="{part}.sheet.main+xml"/>'
        f'<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{part}.worksheet+xml"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{kind}/relationships">'
        f'<Relationship Id="rId1" Type="{of}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
        "xl/workbook.xml": f'<workbook xmlns="{main}" xmlns:r="{of}"><sheets>'
        '<sheet name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{kind}/relationships">'
        f'<Relationship Id="rId1" Type="{of}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>',
        "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{main}"><sheetData>{rows}</sheetData></worksheet>',
    }
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in parts.items():
            entry = zipfile.ZipInfo(name)  # of 1980: the same answers give the same file
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, f'<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n{text}'.encode())
    return content.getvalue()
