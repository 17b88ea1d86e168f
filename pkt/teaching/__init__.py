"""What a teacher says: its next-token distributions for given answers, and answers of its own."""

from pkt.teaching.answering import answer_rows as answer_rows
from pkt.teaching.reading import teach as teach
