from lit_llama.tables import markdown_table


def test_a_table_has_a_text_column_and_number_columns():
    table = markdown_table(["", "ms", "of all"], iter([["a", 1, "5%"], ("b", 22.5, None)]))
    assert table == "|  | ms | of all |\n| --- | ---: | ---: |\n| a | 1 | 5% |\n| b | 22.5 | None |"


def test_vertical_bars_are_escaped():
    assert markdown_table(["a|b"], [["|"]]) == "| a\\|b |\n| --- |\n| \\| |"
