"""The headings of scores, in pages and in the terminal."""

#: The scores of a draft, and their headings.
SCORES = {
    "log_draft": "log ρ_draft",
    "log_self_contain": "log ρ_SC",
    "log_self_reflect": "log ρ_SR",
    "log_listwise": "log ρ_L",
    "log_span": "log ρ_span",
    "log_verdict": "log ρ_verdict",
    "log_agreement": "log agreement",
    "log_score": "log ρ",
}
