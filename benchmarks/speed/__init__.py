"""How fast swagjax is, beside what the machine allows and beside other libraries."""
