from fpgm.study.command import main

main()
