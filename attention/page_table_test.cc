#include "attention/page_table.h"
int main() {}
