"""The default prompts, as Jinja templates: what a real multimodal LLM is asked, after section 3 of the paper.

A processor carries its own copy, so a checkpoint is always asked what it was trained on. A template sees placeholders
instead of texts: it may test, loop over and print its variables, but not cut or measure them.

========================  ===========================================================================================
template                  variables (``noun`` is always there: item, video, product, film, ...)
========================  ===========================================================================================
``item_summary``          ``title``, ``text``, ``image``
``text_summary``          ``title``, ``text``
``image_summary``         ``image``
``fusion``                ``title``, ``text_summary``, ``image_summary``
``preference``            ``items`` (each ``title``, ``summary``), ``previous`` (empty at the first step)
``recommendation``        ``preference``, ``recent`` (each ``title``, ``summary``), ``title``, ``text``, ``image``
``late_user``             ``preference``, ``recent``
``late_item``             ``title``, ``text``, ``image``
``late_answer``           none
========================  ===========================================================================================

``{{ image }}`` is where the image goes; it is empty when there is none. In ``recommendation`` everything about the
user comes before the candidate, so that candidates can share the computation of what precedes them. With
``interaction="late"`` the three ``late_`` templates take its place: what the chat begins with comes before the user,
and what it ends with after ``late_answer``, whose tokens are all that a pair costs.
"""

from typing import Literal

# The prompts whose answer is a text, and how long it may be.
Task = Literal["item_summary", "text_summary", "image_summary", "fusion", "preference"]
MAX_NEW_TOKENS: dict[str, int] = {  # the paper's two descriptions of an item get equal room
    "item_summary": 96,
    "text_summary": 80,
    "image_summary": 80,
    "fusion": 96,
    "preference": 256,
}
PROMPTS = {
    "item_summary": (
        "Title of the {{ noun }}: {{ title }}\n"
        "{% if text %}Description: {{ text }}\n{% endif %}"
        "{% if image %}Picture of the {{ noun }}: {{ image }}\n"
        "Say in one or two sentences what this {{ noun }} is, giving what the picture shows (subject, colours, style, "
        "mood) as much room as what the words say.{% else %}"
        "Say in one or two sentences what this {{ noun }} is.{% endif %} Reply with the description only."
    ),
    "text_summary": (
        "Title of the {{ noun }}: {{ title }}\n"
        "{% if text %}Description: {{ text }}\n{% endif %}"
        "Say in at most 40 words what this {{ noun }} is and whom it may appeal to. Reply with the description only."
    ),
    "image_summary": (
        "Picture of a {{ noun }}: {{ image }}\n"
        "Describe in at most 40 words what the picture shows: subject, colours, style and mood. "
        "Reply with the description only."
    ),
    "fusion": (
        "Title of the {{ noun }}: {{ title }}\n"
        "{% if text_summary %}In words: {{ text_summary }}\n{% endif %}"
        "{% if image_summary %}In its picture: {{ image_summary }}\n{% endif %}"
        "Combine this into one description of the {{ noun }} of one or two sentences, with equal weight on the words "
        "and the picture. Reply with the description only."
    ),
    "preference": (
        "{% if previous %}What a user has preferred so far: {{ previous }}\n"
        "Since then the user has chosen, oldest first:\n{% else %}A user has chosen, oldest first:\n{% endif %}"
        "{% for item in items %}{{ loop.index }}. {% if item.title %}{{ item.title }}"
        "{% if item.summary %}: {% endif %}{% endif %}{{ item.summary }}\n{% endfor %}"
        "{% if previous %}Update the user's preferences: keep what still holds, add what is new, and let recent "
        "choices count for more.{% else %}Infer the user's preferences, in content as well as in looks.{% endif %} "
        "Reply with one paragraph of preferences only, without naming single {{ noun }} titles."
    ),
    "recommendation": (
        "{% if preference %}What a user prefers: {{ preference }}\n{% endif %}"
        "{% if recent %}Most recently the user has chosen:\n{% for item in recent %}- {% if item.title %}"
        "{{ item.title }}{% if item.summary %}: {% endif %}{% endif %}{{ item.summary }}\n{% endfor %}{% endif %}"
        "Candidate {{ noun }}: {{ title }}\n"
        "{% if text %}Description: {{ text }}\n{% endif %}"
        "{% if image %}Picture of the candidate: {{ image }}\n{% endif %}"
        "Will the user choose this {{ noun }}? Answer Yes or No."
    ),
    "late_user": (
        "{% if preference %}What a user prefers: {{ preference }}\n{% endif %}"
        "{% if recent %}Most recently the user has chosen:\n{% for item in recent %}- {% if item.title %}"
        "{{ item.title }}{% if item.summary %}: {% endif %}{% endif %}{{ item.summary }}\n{% endfor %}{% endif %}"
        "Will the user choose the {{ noun }} that follows? Answer Yes or No."
    ),
    "late_item": (
        "Candidate {{ noun }}: {{ title }}\n"
        "{% if text %}Description: {{ text }}\n{% endif %}"
        "{% if image %}Picture of the candidate: {{ image }}{% endif %}"
    ),
    "late_answer": "",
}
