"""Chat templates of the kinds that know tools, written for tests over the tiny tokenizer."""

END = "<|im_end|>"
"""Ends a turn; the tiny tokenizer's own."""

HERMES = (
    """{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- 'Functions that you may call:\\n' }}
{%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}
{{- '"""
    + END
    + """\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '"""
    + END
    + """\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'system' and not loop.first %}{{- raise_exception('late') }}{%- endif %}
{%- if message.role != 'system' %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content %}{{- message.content }}{%- endif %}
{%- for call in message.tool_calls or [] %}
{%- if not loop.first or message.content %}{{- '\\n' }}{%- endif %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '"""
    + END
    + """\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
)

LLAMA = HERMES.replace(
    """{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}""",
    """{{- '{"name": "' + call.function.name + '", "parameters": ' }}
{{- call.function.arguments | tojson }}
{{- '}' }}""",
)

PLAIN = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '"
    + END
    + "\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

REWRITES = (
    "{% for message in messages %}{% if tools and loop.last %}{{ '[TOOLS]' + (tools | tojson) }}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\\n' + (message.content or '') + '"
    + END
    + "\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Shows the tools before the last message, so that every new one moves them."""
