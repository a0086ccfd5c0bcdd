"""Rows for `kvloom batch` with two-level sharing: an instruction for all, a document for some, a
question of one's own, in an order that nobody has chosen."""
import json
import random

WORDS = ("harbour light keeper storm ledger rope signal winter tide boat glass oil brass stair "
         "window chart bell fog mast anchor letter engine coal north").split()


def text(chance, n_words):
    return " ".join(chance.choice(WORDS) for _ in range(n_words))


def rows(n_documents, n_questions, instruction_words, document_words, max_tokens, seed=5):
    """[(custom_id, body)], shuffled"""
    chance = random.Random(seed)
    instruction = "You answer questions about records. " + text(chance, instruction_words)
    made = []
    for document in range(n_documents):
        record = f"Record {document}: " + text(chance, document_words)
        for question in range(n_questions):
            made.append((f"r{document}-{question}", {
                "messages": [{"role": "system", "content": instruction},
                             {"role": "user", "content": record},
                             {"role": "user", "content": f"Question {question}: what of the "
                                                         f"{text(chance, 3)}?"}],
                "max_tokens": chance.randrange(max_tokens // 2, max_tokens + 1),
                "temperature": 0, "ignore_eos": True}))
    chance.shuffle(made)
    return made


def write(path, made):
    with open(path, "w", encoding="utf-8") as out:
        for custom_id, body in made:
            out.write(json.dumps({"custom_id": custom_id, "method": "POST",
                                  "url": "/v1/chat/completions", "body": body}) + "\n")


def read(path):
    """{custom_id: response}; every line is whole and every id stands there once."""
    found = {}
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            assert row["custom_id"] not in found, row["custom_id"]
            found[row["custom_id"]] = row["response"]
    return found
