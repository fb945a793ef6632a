"""Chat templates are rendered as Jinja renders them."""

import pytest
import tiny_internvl
import tiny_processors
import tiny_qwen

from edgeprune.runtimes.chat_template import ChatTemplate

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHATML = """\
{% set image_count = namespace(value=0) %}{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}<|im_end|>
{% else %}{% for content in message['content'] %}
{% if content['type'] == 'image' or 'image' in content %}{% set image_count.value = image_count.value + 1 %}
{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<image>
{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TEMPLATES = {
    "llava": tiny_processors.LLAVA_TEMPLATE,
    "header": tiny_processors.HEADER_TEMPLATE,
    "internvl": tiny_internvl.CHAT_TEMPLATE,
    "chatml": CHATML,
    "qwen": tiny_qwen.CHAT_TEMPLATE,
    "qwen3": tiny_qwen.QWEN3_CHAT_TEMPLATE,
    "text alone": "{{ bos_token }}{%- for m in messages -%}\n  {{- m.content[-1].text | trim -}}\n{%- endfor %}\n\nA:",
}
PROMPTS = ["What is it?", "  Größe\n{{ 7 * 7 }} {% raw %} ", "a\\n'quoted' \"twice\" <image>"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_jinja_renders_them(cpp, name):
    ours = ChatTemplate(TEMPLATES[name])
    requests, expected = [], []
    for prompt in PROMPTS:
        for images in (0, 1, 3):
            requests.append(
                {"template": TEMPLATES[name], "images": images, "prompt": prompt, "special": SPECIAL}
            )
            content = [{"type": "image"}] * images + [{"type": "text", "text": prompt}]
            expected.append(ours.render(content, SPECIAL))
    assert cpp.parts("render", requests) == expected
