"""smtplib against a server: ``smtp_client HOST PORT CA``."""

from __future__ import annotations

import smtplib
import sys
from email.message import EmailMessage

from tests.programs.apps.clients import error_of, say, tls

host, port = sys.argv[1], int(sys.argv[2])


def message(subject: str, size: int) -> EmailMessage:
    letter = EmailMessage()
    letter["Subject"], letter["From"], letter["To"] = subject, "a@example.com", "b@example.com"
    letter.set_content("grüße\n.\n..dots\n" + "x" * 60 + "\n" + "line of text\n" * (size // 13))
    return letter


with smtplib.SMTP(host, port, "client.example.com", timeout=20) as smtp:
    say("ehlo", answer=str(smtp.ehlo()), features=sorted(smtp.esmtp_features))
    for number, size in enumerate((0, 5000, 500_000)):
        say("sent", refused=smtp.send_message(message(f"plain {number}", size)))
    say("refused", error=error_of(smtp.sendmail, "a@example.com", ["nobody@refused.example"], "text"))
    say("noop", answer=str(smtp.noop()))
with smtplib.SMTP(host, port, "client.example.com", timeout=20) as smtp:
    say("starttls", answer=str(smtp.starttls(context=tls(sys.argv[3]))))
    say("ehlo", answer=str(smtp.ehlo()))
    for number, size in enumerate((0, 300_000)):
        say("sent", refused=smtp.send_message(message(f"secret {number}", size)))
say("nobody", error=error_of(smtplib.SMTP, host, 1, timeout=20))
